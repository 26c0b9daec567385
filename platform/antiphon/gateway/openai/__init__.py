"""The OpenAI-compatible HTTP door (request speed)."""
