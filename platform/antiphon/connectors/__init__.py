"""Gives bytes a meaning: A2F/F2A rows and KV blocks (hot)."""
