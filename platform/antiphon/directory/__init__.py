"""Workers under leases: who is registered, where, and for how long (control speed)."""
