"""`proma compare`: the same task by several algorithms and seeds, from one and the same policy."""
