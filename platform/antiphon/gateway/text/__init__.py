"""Between text and tokens: templates, tokenizer, stop strings (request speed)."""
