"""What a token costs: shapes of models, number formats, accelerators, bytes, operations and dollars (control speed)."""
