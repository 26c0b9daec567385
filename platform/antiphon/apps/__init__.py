"""Composition roots: the only place that sees everything; Ray Serve deployments (control speed)."""
