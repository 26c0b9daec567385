"""The only door to grpc and protobuf: generated messages, codecs, channels, services (request speed)."""
