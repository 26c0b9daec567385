"""What stands around a prompt and does not decide who answers: courtesies, roles, other languages, examples (request speed)."""
