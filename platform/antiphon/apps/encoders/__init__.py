"""Processes that serve encoders (control speed)."""
