"""Sessions between gateways and engines over gRPC (request speed)."""
