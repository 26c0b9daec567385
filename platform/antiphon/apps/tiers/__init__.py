"""Processes whose models share memory: plan, process, model pool (control speed)."""
