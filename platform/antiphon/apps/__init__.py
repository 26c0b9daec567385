"""Composition roots: the only place that sees everything; Ray Serve deployments (control speed)."""

import os

# Read when gRPC starts. Otherwise gRPC starts its threads again in every child between fork and exec, and now and then one of them
# aborts: Ray forks its processes so, and waits for half a minute for one that is gone before it ran. Nothing here needs gRPC in a
# fork.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
