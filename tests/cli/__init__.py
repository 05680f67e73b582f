"""The commands, run whole on a tiny model."""
