"""C source of a decision's fast path, and the loader that compiles it once (control)."""
