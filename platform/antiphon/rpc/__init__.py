"""The only door to grpc and protobuf: generated messages, codecs, channels, services (request speed)."""

import os

# grpc's core writes every connection that a server closed to stderr; whoever wants to read that sets the variable.
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
