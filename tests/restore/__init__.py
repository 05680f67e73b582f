"""The planner's laws under random events; plans worked by hand."""
