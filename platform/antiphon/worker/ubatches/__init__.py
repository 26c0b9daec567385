"""Ubatches: how steps are cut and ordered, how many there are, and ubatches with steps of their own (step speed)."""
