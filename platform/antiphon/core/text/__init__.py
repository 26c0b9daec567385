"""Text that strangers wrote, made values within limits (request speed; no I/O)."""
