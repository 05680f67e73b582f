"""SCBench in miniature: what its tasks ask, how answers are scored, and how sessions run."""
