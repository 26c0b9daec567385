"""Nouns and arithmetic of the platform: documents, requests, steps, blocks, errors (no torch, no I/O)."""
