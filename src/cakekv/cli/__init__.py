"""The commands, thin: each does what a line or two of Python would."""
