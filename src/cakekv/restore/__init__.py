"""The planner: what to compute and load next. Pure Python: no torch, no I/O, no threads, no clock of its own."""
