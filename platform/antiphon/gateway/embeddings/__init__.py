"""Embeddings, scores and rankings: requests that end with the prompt (request speed)."""
