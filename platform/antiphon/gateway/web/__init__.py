"""The page that a browser shows of a gateway: its files, and the traced step on it (request speed)."""
