"""A picture of a run: curves, and completions with each token coloured by the student's distance to its teacher."""
