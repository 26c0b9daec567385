"""What a worker has on a card alone (step)."""
