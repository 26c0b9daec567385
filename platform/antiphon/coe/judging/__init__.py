"""What a router is worth: cross-validation, comparisons, reports (control speed, offline)."""
