"""Other people's programs, unmodified, with this server in vLLM's place: lm-evaluation-harness and TRL."""
