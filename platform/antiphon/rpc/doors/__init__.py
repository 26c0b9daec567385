"""How a gRPC door deals with whoever comes: its connections, and its calls until they are begun (request speed)."""
