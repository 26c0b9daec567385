"""C source of the shared-memory channel, and the loader that compiles it once (control)."""
