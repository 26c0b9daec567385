"""Speculation: drafts of a request's next tokens, verified as further rows of its step (step speed, no torch)."""
