"""Measuring: the modes side by side on a model, the clairvoyant bound, links and servers to measure with."""
