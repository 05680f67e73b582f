"""The laws of priority policies, run for each; cases worked by hand."""
