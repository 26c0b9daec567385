"""How a router is made from a score table (control speed, offline)."""
