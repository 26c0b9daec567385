"""Messages of antiphon.rpc.v1 to values and back (request speed)."""
