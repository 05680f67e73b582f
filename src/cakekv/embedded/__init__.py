"""The embedded driver: it restores prompts in one process, on one model, with threads."""
