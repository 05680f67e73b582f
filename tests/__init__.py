"""The tests mirror `src/cakekv`; what several folders share is here."""
