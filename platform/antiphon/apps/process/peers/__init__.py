"""The peers of a worker: found, linked, and watched while they owe something (control speed)."""
