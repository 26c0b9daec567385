"""The kinds as the API server sees them: schemas, rules, columns, statuses (control speed)."""
