"""What serving has to know of a Ray: how to join one, and whether it lives (control speed)."""
