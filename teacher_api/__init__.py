"""The wire contract and a torch-free client for it."""
