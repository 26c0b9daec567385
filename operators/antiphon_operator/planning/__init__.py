"""What to do, decided in pure functions: sizes, scaling, rollouts and their preview (control speed)."""
