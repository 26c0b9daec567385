"""Outputs that must have a shape: grammars and thinking budgets, enforced by ids (step speed)."""
