"""Parts of a composition's document (control speed)."""
