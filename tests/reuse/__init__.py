"""Ways to reuse documents, without a model."""
