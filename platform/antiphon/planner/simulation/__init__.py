"""Planned pools under arrivals, failures and stragglers (control speed)."""
