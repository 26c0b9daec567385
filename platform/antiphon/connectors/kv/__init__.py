"""KV hand-off from prefill workers to the workers that decode (hot)."""
