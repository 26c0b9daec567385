"""What a start shows where there is no terminal: a line now and then, no more."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from antiphon.apps.serve.deployment_set import serving_of
from antiphon.apps.supervision.event_log import EventLogEntry
from antiphon.cli.serving.serve_view import Progress, endpoints
from antiphon.core.document.loading import parse_object
from antiphon.gateway.config import BoundPorts
from antiphon.models.loading.progress import Amount
from antiphon.testing import FakeClock


def lines_of(out: io.StringIO) -> list[str]:
    return out.getvalue().splitlines()


def test_without_a_terminal_an_amount_is_a_line_now_and_then() -> None:
    clock, out = FakeClock(), io.StringIO()
    progress = Progress(Console(file=out, width=200), clock)
    for second in range(31):
        progress.amount(Amount(what="Downloading org/name", num_bytes=second * 100_000_000, total_bytes=10_000_000_000))
        clock.advance(1.0)
    assert lines_of(out) == [
        "Downloading org/name: 1.0 GB of 10 GB, 100 MB/s, 90 s left",
        "Downloading org/name: 2.0 GB of 10 GB, 100 MB/s, 80 s left",
        "Downloading org/name: 3.0 GB of 10 GB, 100 MB/s, 70 s left",
    ]


def test_what_is_over_in_seconds_is_no_line_and_each_worker_has_its_own() -> None:
    clock, out = FakeClock(), io.StringIO()
    progress = Progress(Console(file=out, width=200), clock)
    entries: list[EventLogEntry] = []
    for second in range(0, 12, 3):
        for subject in ("attention/0", "ffn/0") if second else ("attention/0",):
            facts = {"num_bytes": second * 1_000_000, "total_bytes": 40_000_000}
            entries.append(EventLogEntry(kind="loading", subject=subject, time_s=0.0, facts=facts))
        progress.update(entries, 2)
        clock.advance(3.0)
    entries.append(EventLogEntry(kind="loading", subject="attention/0", time_s=0.0, facts={"num_bytes": 12_000_000}))
    progress.update(entries, 2)
    assert lines_of(out) == ["attention/0 reads weights: 12 MB, 1.0 MB/s"]


@pytest.mark.parametrize(("architecture", "path"), [("LlamaForCausalLM", "chat/completions"), ("BertModel", "embeddings")])
def test_the_first_request_is_one_that_the_model_answers(tmp_path: Path, architecture: str, path: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"architectures": [architecture], "hidden_size": 8}))
    document = {
        "apiVersion": "serving.antiphon.dev/v1alpha1",
        "kind": "LLMDeployment",
        "metadata": {"name": "m"},
        "spec": {"model": {"uri": str(tmp_path)}, "pools": [{"name": "all", "role": "monolith"}]},
    }
    serving = replace(serving_of([parse_object(document, "test")], "test"), checkpoints={"m": str(tmp_path)})
    assert f":8000/v1/{path} " in endpoints(serving, BoundPorts(host="127.0.0.1", http_port=8000, grpc_port=9000)).plain
