"""C source of the shared-memory lane, and the loader that compiles it once (control)."""
