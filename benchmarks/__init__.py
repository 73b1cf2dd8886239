"""Speeds, as ratios measured side by side in one run. README.md explains the keys."""
