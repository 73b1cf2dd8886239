"""A long-running service that returns per-token teacher logprobs."""
