"""Which models are supported, what they are called, and that spans of prefill are exact."""
