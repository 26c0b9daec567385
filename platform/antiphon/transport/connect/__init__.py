"""How a link comes about: addresses, listening, the hello, choosing a transport (control)."""
