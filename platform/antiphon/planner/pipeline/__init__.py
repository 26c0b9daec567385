"""One decode or prefill group: stages, exchange, ubatches, barriers, and the best batch (control speed)."""
