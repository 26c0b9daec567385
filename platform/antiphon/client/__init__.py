"""The SDK: typed sync and async clients of antiphon.rpc.v1 (request speed)."""
