"""Parts of layers: norms, activations, linear layers, rotary tables (hot)."""
