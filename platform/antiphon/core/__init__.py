"""Nouns and arithmetic of the platform: documents, requests, steps, blocks, errors (pure values: no torch, no I/O)."""
