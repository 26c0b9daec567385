"""``python -m antiphon_operator`` (control speed)."""

from antiphon_operator.cli import main

if __name__ == "__main__":
    main()
