"""Moves bytes between registered regions (hot); gives them no meaning."""
