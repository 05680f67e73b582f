"""The laws of eviction policies, run for each, in every tier that evicts."""
