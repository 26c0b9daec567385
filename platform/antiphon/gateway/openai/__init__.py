"""OpenAI-shaped bodies in and out (request speed)."""
