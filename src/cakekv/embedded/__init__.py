"""The embedded driver: restores in one process, on one model, in threads."""
