"""Kernels for graphics cards, each a registered op with a torch reference, a fake and a Triton implementation (hot).

Imported only where a card is used; ``ops`` is the door, and the one place that knows which implementation serves. Must not know:
families, workers, what a step is.
"""
