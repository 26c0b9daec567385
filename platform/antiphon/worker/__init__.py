"""Model runner, attention worker, FFN worker, ubatch plan, sampler (hot)."""
