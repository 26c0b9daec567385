"""What ``antiphon bench`` measures: links, and whole deployments of real processes (control speed)."""
