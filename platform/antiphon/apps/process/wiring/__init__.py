"""Documents to workers: what the model is, how large its links are, and the parts put together (control speed)."""
