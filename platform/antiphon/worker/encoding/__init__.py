"""Workers of encoders: whole texts in, vectors out (step speed)."""
