"""How cards are dealt out to local workers, and what is said where there are too few."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from antiphon.apps.devices import deal
from antiphon.apps.process.config import LogSettings, WorkerConfig
from antiphon.apps.process.lifecycle import device_of
from antiphon.apps.serve.plan import PoolTemplate
from antiphon.core.document.spec import LLMDeployment
from antiphon.core.errors import InvalidInput
from antiphon.core.ids import Epoch
from antiphon.device.driver import Card, Cards


def deployment(*pools: dict[str, Any], name: str = "demo") -> LLMDeployment:
    return LLMDeployment.model_validate(
        {
            "apiVersion": "serving.antiphon.dev/v1alpha1",
            "kind": "LLMDeployment",
            "metadata": {"name": name},
            "spec": {"model": {"uri": "/m"}, "topology": "afd", "pools": list(pools)},
        }
    )


def machine(*names: str, why: str = "") -> Callable[[], Cards]:
    cards = tuple(Card(visible=name, name="card", memory_bytes=80 << 30, capability=(9, 0)) for name in names)
    return lambda: Cards(cards=cards, why_none=why)


def attention(replicas: int = 1, **resources: Any) -> dict[str, Any]:
    return {"name": "a", "role": "attention", "replicas": replicas, "resources": resources}


def ffn(replicas: int = 1, **resources: Any) -> dict[str, Any]:
    return {"name": "f", "role": "ffn", "replicas": replicas, "resources": resources}


def test_each_worker_gets_a_card_of_its_own() -> None:
    dealt = deal([deployment(attention(2, gpu=1), ffn(1, gpu=1))], machine("0", "1", "2"))
    assert dealt == {("demo", "a"): ("0", "1"), ("demo", "f"): ("2",)}


def test_workers_share_a_card_where_their_shares_fit() -> None:
    dealt = deal(
        [deployment(attention(1, gpu=1, gpuMemoryUtilization=0.55), ffn(1, gpu=1, gpuMemoryUtilization=0.45))], machine("7")
    )
    assert dealt == {("demo", "a"): ("7",), ("demo", "f"): ("7",)}


def test_too_few_cards_are_refused_with_the_field() -> None:
    with pytest.raises(InvalidInput, match=r"^LLMDeployment/demo: spec\.pools\[1\]\.resources\.gpu: .*gpuMemoryUtilization"):
        deal([deployment(attention(gpu=1), ffn(gpu=1))], machine("0"))


def test_other_deployments_cards_are_not_dealt_out_again() -> None:
    two = [deployment(attention(gpu=1), ffn()), deployment(attention(gpu=1), ffn(), name="other")]
    assert deal(two, machine("0", "1")) == {("demo", "a"): ("0",), ("other", "a"): ("1",)}


def test_without_a_pool_that_asks_nobody_looks_for_cards() -> None:
    def look() -> Cards:
        raise AssertionError("looked")

    assert deal([deployment(attention(), ffn())], look) == {}


def test_a_worker_is_told_its_card_and_keeps_it_over_a_restart() -> None:
    document = deployment(attention(2, gpu=1), ffn())
    template = PoolTemplate(
        document=document, pool="a", checkpoint="/c", directory="d", host="h", drain_s=1.0, log=LogSettings(), cards=("3", "5")
    )
    assert [template.worker(index, Epoch(1)).card for index in (0, 1, 0)] == ["3", "5", "3"]
    told = template.worker(1, Epoch(2))
    assert WorkerConfig.from_json(told.to_json()) == told


def test_a_worker_without_a_usable_card_refuses_and_names_the_field(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    document = deployment(attention(), ffn(gpu=1))
    template = PoolTemplate(document=document, pool="f", checkpoint="/c", directory="d", host="h", drain_s=1.0, log=LogSettings())
    with pytest.raises(InvalidInput, match=r"^spec\.pools\[1\]\.resources\.gpu: the worker asks for a card"):
        device_of(template.worker(0, Epoch(1)))


def test_serve_without_a_card_says_so_in_one_sentence_and_fails(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(
        "apiVersion: serving.antiphon.dev/v1alpha1\nkind: LLMDeployment\nmetadata: {name: demo}\n"
        "spec:\n  model: {uri: /nowhere}\n  pools: [{name: all, role: monolith, resources: {gpu: 1}}]\n"
    )
    code = "from antiphon.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "serve", "-f", str(path), "--no-ray"],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        check=False,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == 1, done.stdout + done.stderr
    assert "LLMDeployment/demo: spec.pools[0].resources.gpu: pool all asks for a card and " in errors[0]
    assert errors[0].endswith("with gpu: 0 it computes on the CPU")
