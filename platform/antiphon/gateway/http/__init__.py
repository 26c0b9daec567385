"""What stands between a socket and the HTTP doors: limits of connections, headers, bodies, and HTTP's manners (request speed)."""
