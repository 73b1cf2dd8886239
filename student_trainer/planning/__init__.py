"""What a run will need and how fast it will be, by formula: on this machine, or on one that is described."""
