"""Links through memory both ends map (hot)."""
