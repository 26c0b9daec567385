"""Chat templates: rendered within limits, and the markers that clients may not write (request speed)."""
