"""The directory over gRPC: client and service (control speed)."""
