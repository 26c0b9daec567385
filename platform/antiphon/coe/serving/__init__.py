"""Compositions behind the doors: who decides, experts' health, falling back (request speed)."""
