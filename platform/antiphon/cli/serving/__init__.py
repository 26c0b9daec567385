"""Verbs around a running deployment (control speed)."""
