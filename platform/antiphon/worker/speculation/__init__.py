"""Drafts verified: which of them are what the model draws (hot)."""
