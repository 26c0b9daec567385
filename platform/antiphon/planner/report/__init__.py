"""Plans, costs and simulations for people and tools: tables, JSON, HTML, pictures (control speed)."""
