"""From a request to its answer, whichever door it came through (request speed)."""
