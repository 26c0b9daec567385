"""What ``antiphon coe demo`` makes and asks (control speed)."""
