"""Models that answer with a vector: what they are, and how their rows become one (values; step speed in ``pooler``)."""
