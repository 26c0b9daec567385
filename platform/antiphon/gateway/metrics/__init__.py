"""The gateway's instruments (request speed)."""
