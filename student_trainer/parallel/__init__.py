"""How a student is spread over the ranks of a run, chosen by train.strategy. All strategies take the same steps: the
sum of the ranks' gradients, one clip by their global norm, one update. What differs is who holds what.
"""
