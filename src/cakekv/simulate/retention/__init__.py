"""What is worth keeping: eviction policies compared by the time to first token that they save on a trace."""
