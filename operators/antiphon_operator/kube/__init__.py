"""The only door to the API server (control speed)."""
