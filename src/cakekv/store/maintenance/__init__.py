"""Looking after stores of any kind: verify, repair, collect, copy, export.

The commands `cakekv store …` are these, with progress bars.
"""
