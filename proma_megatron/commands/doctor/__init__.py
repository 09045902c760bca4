"""What a machine has, whether each part works, and what a run would use: `proma doctor`."""
