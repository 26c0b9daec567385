"""Paged attention and its cache, by variant (hot)."""
