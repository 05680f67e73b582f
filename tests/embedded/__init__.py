"""The embedded driver's threads: saving behind, and calls that an interrupt cannot break."""
