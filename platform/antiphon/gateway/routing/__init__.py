"""Which workers serve a request, and the sessions to them (request speed)."""
