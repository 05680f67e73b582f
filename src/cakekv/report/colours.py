"""One colour per arm, the same in bars, tables and pictures; told apart by the colour-blind and in grey, too."""

from __future__ import annotations

COMPUTE = "#2563c9"
LOAD = "#e07b00"
BOTH = "#1b8a5a"
BOUND = "#444444"
WASTED = "#9aa0a6"
FAILED = "#c62828"

MODES = {"compute": COMPUTE, "load": LOAD, "both": BOTH, "auto": BOTH}
