"""How good a router is on a table (control speed, offline)."""
