"""Composition of experts: embed, classify, map, route; train and evaluate (request speed)."""
