"""Restore a prompt's KV cache from both ends: compute the head, load the tail, meet in the middle."""

from __future__ import annotations

__version__ = "0.1.0"
