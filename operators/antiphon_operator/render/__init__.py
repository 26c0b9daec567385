"""What is written to the API server for a document: pure, deterministic (control speed)."""
