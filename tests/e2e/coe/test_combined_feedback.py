"""Feedback on what several experts were asked for: it is held against the one that gave the answer."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

_spec = importlib.util.spec_from_file_location("coe_doors", Path(__file__).with_name("test_doors.py"))
assert _spec is not None
assert _spec.loader is not None
doors = importlib.util.module_from_spec(_spec)
sys.modules[_spec.name] = doors
_spec.loader.exec_module(doors)

artifact = doors.artifact


async def test_feedback_on_a_streamed_answer_is_held_against_who_gave_it(artifact: Any, tmp_path: Path) -> None:
    """The end of the response is a disconnect to whoever watches the client: it must not end the noting too."""
    log, experts = tmp_path / "feedback.jsonl", doors.SureExperts({"served-0": -5.0})
    async with doors.door(artifact, experts, combine=doors.CASCADE, learning={"log": str(log)}) as (client, _):
        for _ in range(3):
            answer = await doors._ask(client, stream=True)
            told = {"decision_id": answer.headers["x-antiphon-decision-id"], "score": 0.0}
            assert (await client.post("/v1/feedback", json=told)).status_code == 200
    assert [json.loads(line)["expert"] for line in log.read_text().splitlines()] == ["model-2"] * 3
