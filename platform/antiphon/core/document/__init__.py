"""The documents people write: typed models, their YAML, and what is wrong with one (no torch, no I/O beyond files named)."""
