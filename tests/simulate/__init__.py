"""The planner on a virtual clock: the paper's cells, the optimum, what-if."""
