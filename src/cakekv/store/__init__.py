"""The tiers: chunks by key, each tier a file, and what is put around and beside them."""
