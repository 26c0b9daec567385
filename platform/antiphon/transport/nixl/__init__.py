"""Links by NIXL over UCX (hot)."""
