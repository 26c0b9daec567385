"""``make gpu``: everything of ``card`` on this machine's card, and its figures as JSON (control speed).

A machine without a card is told so before torch is imported, which takes seconds. Must not know: what is measured.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from antiphon.device.driver import look_for_cards


def main(arguments: Sequence[str] | None = None) -> int:
    """Run everything; the exit status. Without a card nothing is run, and one line says why."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("build/gpu"), help="folder of card.json")
    options = parser.parse_args(arguments)
    cards = look_for_cards()
    if not cards.cards:
        print(f"make gpu: {cards.why_none}: nothing was run")  # noqa: T201
        return 1
    import torch

    from antiphon.apps.bench.card import Bench, run_sections, sections
    from antiphon.device.device import open_device

    device = open_device("cuda", 0.9, "make gpu")
    card = cards.cards[0]
    bench = Bench(device=device.torch, memory=device.memory)
    print(f"{card.name}, driver {cards.driver}, torch {torch.__version__}")  # noqa: T201
    failed = run_sections(sections(bench), print)
    options.out.mkdir(parents=True, exist_ok=True)
    told = {"card": asdict(card), "driver": cards.driver, "torch": str(torch.__version__), "found": bench.found, "failed": failed}
    (options.out / "card.json").write_text(json.dumps(told, indent=1))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
