"""Looking after stores: verifying, repairing, collecting, copying, exporting; for any kind of store, and for programs.

The commands `cakekv store …` are these, with progress bars.
"""
