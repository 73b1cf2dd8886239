"""`student-migrate`: other systems' configurations and command lines as ours. One module per system, each a table of
their keys; what has no counterpart is named, never dropped in silence."""
