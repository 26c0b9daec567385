"""What a router learns from feedback while it serves (request speed)."""
