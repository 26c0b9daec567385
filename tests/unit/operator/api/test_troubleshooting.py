"""Each reason of a condition has its heading on the troubleshooting page."""

from __future__ import annotations

from pathlib import Path

from antiphon_operator.api.conditions import Reason

PAGE = Path(__file__).parents[4] / "deploy/docs/troubleshooting.md"


def test_every_reason_is_a_heading_and_every_heading_a_reason() -> None:
    headings = [line.removeprefix("## ") for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("## ")]
    assert sorted(headings) == sorted(reason.value for reason in Reason)
