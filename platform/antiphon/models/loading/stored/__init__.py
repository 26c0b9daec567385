"""How weights that are no plain tensors are stored, format by format: what config.json may say, and reading (control speed)."""
