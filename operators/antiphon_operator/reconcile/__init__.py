"""Level-based reconciling: a key goes in, the world is read, one step is taken, the status is written (control speed)."""
