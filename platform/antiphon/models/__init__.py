"""Layers, attention variants, decoder halves, weights by role, families (hot)."""
