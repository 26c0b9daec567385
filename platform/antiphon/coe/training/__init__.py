"""From score tables to a router artifact (control speed, offline)."""
