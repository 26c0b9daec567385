"""``python -m antiphon`` is the antiphon command (control speed)."""

from antiphon.cli import main

main()
