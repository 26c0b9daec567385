"""A2F and F2A: rows from attention workers to FFN workers and back (hot)."""
