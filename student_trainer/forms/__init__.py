"""What a student may be: any causal language model in whole, with adapters, with layers of another model, partly
frozen, or of a class of the user's own. Its checkpoints describe themselves; `loading` builds each of them again."""
