"""A cluster of nodes that serve a trace."""
