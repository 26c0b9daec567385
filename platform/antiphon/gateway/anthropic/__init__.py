"""Anthropic's Messages over the same gateway (request speed)."""
