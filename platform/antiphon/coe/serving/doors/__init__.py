"""A composition's HTTP and gRPC doors (request speed)."""
