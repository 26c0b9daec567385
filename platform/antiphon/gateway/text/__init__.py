"""Text models and what their text means: calls, thoughts, structure (request speed)."""
