"""The process: leadership, watches, the queue of keys, rest, health and logs (control speed)."""
