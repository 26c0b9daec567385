"""Who may ask for what: API keys, tenants, their limits and what they used (request speed)."""
