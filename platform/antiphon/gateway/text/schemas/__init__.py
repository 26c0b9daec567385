"""JSON schemas as the engine of grammars takes them (request speed)."""
