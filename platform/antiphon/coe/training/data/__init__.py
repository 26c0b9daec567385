"""What routers are trained and judged on: score tables, labels, other wordings (control speed, offline)."""
