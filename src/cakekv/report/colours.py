"""One colour per arm, the same in bars, tables and pictures."""

from __future__ import annotations

COMPUTE = "#2563c9"
LOAD = "#e07b00"
BOTH = "#0a9a50"
BOUND = "#444444"
WASTED = "#9aa0a6"
FAILED = "#c62828"

MODES = {"compute": COMPUTE, "load": LOAD, "both": BOTH, "auto": BOTH}
