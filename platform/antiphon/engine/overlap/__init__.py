"""Steps that are decided while the one before is computed (step speed, no torch)."""
