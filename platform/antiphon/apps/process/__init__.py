"""What runs in a worker's process (control speed around hot loops)."""
