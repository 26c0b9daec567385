"""From a model's uri to tensors by name (control speed)."""
