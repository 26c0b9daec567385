"""The router service of compositions over gRPC (request speed)."""
