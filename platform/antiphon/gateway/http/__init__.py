"""What stands between a socket and the HTTP doors: limits of connections, headers and bodies, and HTTP's own manners."""
