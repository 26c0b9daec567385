"""More experts than fit in memory: the policy and the pool it runs (request speed)."""
