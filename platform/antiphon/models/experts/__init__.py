"""Experts of a layer: gates, shards, placement, and where rows go (hot)."""
