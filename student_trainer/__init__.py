"""A trainer for on-policy distillation against a remote teacher."""
