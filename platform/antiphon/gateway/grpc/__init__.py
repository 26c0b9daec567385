"""The public gRPC door (request speed)."""
