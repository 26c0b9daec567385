"""The doors: OpenAI HTTP, gRPC, tokenizer, endpoint picker, directory of workers (request speed)."""
