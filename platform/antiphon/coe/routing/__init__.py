"""What a router needs to decide: artifact, embedding, decision (request speed)."""
