"""The third driver: the same planner on a virtual clock."""
