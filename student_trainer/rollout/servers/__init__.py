"""The trainer's side of servers that sample for it (`rollout-serve`): which to ask, and that they have its weights."""
