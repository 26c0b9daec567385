"""Tools that are called with a text instead of JSON (request speed)."""
