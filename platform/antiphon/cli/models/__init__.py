"""Verbs about models and their experts (control speed)."""
