"""What a restore needs of a model: a cache that is filled from both ends, spans of prefill, an identity."""
