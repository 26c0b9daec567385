"""A drafter that can't serve the model is refused by the field that asks for it; one that can shares what it may."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from antiphon.core.document.serving import SpeculationSpec
from antiphon.core.errors import InvalidInput
from antiphon.testing import LocalCluster, wiring, write_tiny_llama


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("llama"))


def refused(tiny: Path, **speculation: Any) -> InvalidInput:
    with pytest.raises(InvalidInput) as found:
        LocalCluster(wiring(tiny, "monolith", speculation=speculation), tiny)
    return found.value


def test_a_draft_model_of_another_vocabulary_is_refused(tiny: Path, tmp_path: Path) -> None:
    other = write_tiny_llama(tmp_path / "renamed")
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    words = tokenizer["model"]["vocab"]
    words["a"], words["b"] = words["b"], words["a"]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    error = refused(tiny, drafter="model", model={"uri": str(other)})
    assert error.field == "spec.speculation.model.uri"
    assert "'a'" in str(error)
    assert "'b'" in str(error)
    (other / "tokenizer.json").unlink()  # then the sizes decide
    larger = write_tiny_llama(tmp_path / "larger", vocab_size=400)
    (larger / "tokenizer.json").unlink()
    error = refused(tiny, drafter="model", model={"uri": str(larger)})
    assert error.field == "spec.speculation.model.uri"
    assert "400" in str(error)


def test_a_draft_model_that_is_not_there_and_too_many_layers_are_refused(tiny: Path, tmp_path: Path) -> None:
    error = refused(tiny, drafter="model", model={"uri": str(tmp_path / "nowhere")})
    assert error.field == "spec.speculation.model.uri"
    error = refused(tiny, drafter="layers", layers=2)
    assert error.field == "spec.speculation.layers"
    assert "2" in str(error)


def test_a_deployment_that_nobody_looked_up_is_refused(tiny: Path) -> None:
    error = refused(tiny, drafter="model", model={"deploymentRef": "small"})
    assert error.field == "spec.speculation.model.deploymentRef"
    assert "'small'" in str(error)


@pytest.mark.parametrize(
    ("section", "field"),
    [
        ({"drafter": "model"}, "model"),
        ({"drafter": "layers"}, "layers"),
        ({"drafter": "mtp", "layers": 2}, "layers"),
        ({"model": {"uri": "/m"}}, "model"),
        ({"drafter": "model", "model": {"deployment": "small"}}, "deployment"),
        ({"drafter": "model", "model": {}}, "deploymentRef"),
        ({"drafter": "model", "model": {"uri": "/m", "deploymentRef": "small"}}, "deploymentRef"),
        ({"drafter": "model", "model": {"revision": "v1", "deploymentRef": "small"}}, "revision"),
        ({"drafter": "eagle"}, "drafter"),
    ],
)
def test_sections_that_say_what_their_drafter_has_not_are_refused_by_field(section: dict[str, Any], field: str) -> None:
    with pytest.raises(ValidationError, match=field):
        SpeculationSpec.model_validate(section)


def test_first_layers_share_every_weight_where_the_process_holds_them(tiny: Path) -> None:
    with LocalCluster(wiring(tiny, "monolith", speculation={"drafter": "layers", "layers": 1}), tiny) as cluster:
        (part,) = cluster.generating
        assert part.engine.scheduler.speculator is not None
        drafter: Any = part.engine.scheduler.speculator.drafter
        decoder = drafter._decoder
        assert part.ffn is not None
        assert decoder.halves._layers == part.worker.halves._layers[:1]
        assert decoder.halves.head.linear is part.worker.halves.head.linear
        assert decoder._ffns.ffns == part.ffn.halves.ffns[:1]
