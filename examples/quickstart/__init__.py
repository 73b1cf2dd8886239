"""A small teacher, a weaker student, and an on-policy distillation between them, all made on the spot."""
