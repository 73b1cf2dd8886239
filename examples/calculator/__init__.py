"""On-policy distillation with a tool: a teacher that lets a calculator do the sums, and a student that learns to."""
