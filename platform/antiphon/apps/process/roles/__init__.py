"""What a worker of each role holds, whom it needs, and what it shows of itself (control speed around a hot loop)."""
