"""The documents people write: typed models, their YAML, what is wrong with one (control speed; no I/O beyond files named)."""
