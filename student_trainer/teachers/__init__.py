"""The teachers of a run beyond one that simply scores: several, privileged ones, and the student's own past."""
