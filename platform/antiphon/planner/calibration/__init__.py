"""Predictions fitted to what was measured, and held against it (control speed)."""
