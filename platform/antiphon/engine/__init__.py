"""Engine core loop, scheduler, KV block manager: decides; no torch, no I/O (step speed)."""
