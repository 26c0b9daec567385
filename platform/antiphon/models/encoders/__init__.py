"""Encoders: models that see a whole text at once, and keep nothing of it (hot)."""
