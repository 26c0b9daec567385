"""How much a worker reads is known before it has read it, for every role."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from antiphon.apps.process.config import WorkerConfig
from antiphon.apps.process.events import WorkerEvent
from antiphon.apps.process.load_report import bytes_to_read
from antiphon.apps.process.wiring.build import build_attention, build_ffn
from antiphon.apps.process.wiring.resolve import resolve_model
from antiphon.core.ids import Epoch, FFNShard, Role, WorkerId
from antiphon.testing import wiring, write_tiny_llama


@pytest.mark.parametrize("role", [Role.MONOLITH, Role.ATTENTION, Role.FFN])
def test_what_is_announced_is_read(tmp_path: Path, role: Role) -> None:
    checkpoint = write_tiny_llama(tmp_path)
    spec = wiring(checkpoint, "monolith" if role is Role.MONOLITH else "afd", ffn=2 if role is Role.FFN else 1)
    facts = resolve_model(spec, str(checkpoint), "test")
    config = WorkerConfig(
        deployment="d",
        model="m",
        revision="r",
        checkpoint=str(checkpoint),
        role=role,
        pool=role.value,
        index=0,
        epoch=Epoch(1),
        spec=spec,
        directory="",
        shard=FFNShard.of(0, num_tensor=2, num_expert=1) if role is Role.FFN else FFNShard(),
    )
    announced = bytes_to_read(facts, config)
    before = facts.checkpoint.bytes_read
    if role is Role.FFN:
        build_ffn(facts, config.shard, Epoch(1)).side.close()
    else:
        build_attention(facts, spec, role, WorkerId("a"), Epoch(1), lambda _outputs: None, lambda: 0.0, index=0).close()
    read = facts.checkpoint.bytes_read - before
    assert announced is not None
    assert read == pytest.approx(announced, rel=0.02)


def test_an_event_of_loading_travels() -> None:
    event = WorkerEvent(event="loading", facts={"num_bytes": 5, "total_bytes": 9})
    assert WorkerEvent.from_json(event.to_json()) == event
    assert json.loads(event.to_json()) == {"event": "loading", "facts": {"num_bytes": 5, "total_bytes": 9}}
