"""What a worker computes on: CPU or card; its memory, streams and graphs, and "these bytes are there" (step speed).

Must not know: models, workers, what is computed.
"""
