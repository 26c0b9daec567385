"""What prompts become before a model is fitted: token vectors, topics, sentences (control speed, offline)."""
