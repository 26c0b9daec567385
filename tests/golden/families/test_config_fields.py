"""No field of a config is silently ignored: where ours makes nothing of another value, transformers' logits are the same with it.

Every leaf of the config of every family with states, windows or sparse attention, and of GLM, is set to odd values, one at a time.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError

from antiphon.core.errors import UnsupportedModel
from antiphon.models.families import describe
from antiphon.testing import unsettle

MODELS = Path(__file__).parent / "test_families.py"
FAMILIES: tuple[str, ...] = (
    "deepseek_v32",
    "gemma2",
    "glm4_moe",
    "glm4_moe-air",
    "glm4_moe_lite",
    "glm_moe_dsa",
    "gpt_oss",
    "kimi_linear",
    "lfm2",
)
FAMILIES += ("qwen3_5", "qwen3_5_moe", "qwen3_next", "step3p7")
# What says which model it is, belongs to another modality, or only says how Python gets its answer.
NOT_TRIED = {"architectures", "model_type", "transformers_version", "dtype", "vision_config", "id2label", "label2id", "return_dict"}
TOKENS = [(7 * i + i * i) % 190 + 1 for i in range(40)]


@pytest.fixture(scope="module")
def models() -> Any:
    spec = importlib.util.spec_from_file_location("models_of_families", MODELS)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def leaves(raw: Mapping[str, Any], before: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    for key, value in raw.items():
        if key in NOT_TRIED:
            continue
        if isinstance(value, dict):
            yield from leaves(value, (*before, key))
        else:
            yield (*before, key), value


def odd_values(value: Any) -> list[Any]:
    match value:
        case bool():
            return [not value]
        case int():
            return [value + 1, value * 2 if value else 2]
        case float():
            return [value * 1.5 + 0.25]
        case str():
            return ["gelu", "relu"]
        case None:
            return [True, 3, 0.5, "gelu"]
        case list() if value and all(isinstance(each, int | float) for each in value):
            return [[value[-1], *value[1:]], [0.5 * each for each in value]]
    return []


Change = tuple[tuple[str, ...], Any]


def changed(raw: Mapping[str, Any], changes: Sequence[Change]) -> dict[str, Any]:
    copied: dict[str, Any] = copy.deepcopy(dict(raw))
    for path, value in changes:
        section = copied
        for key in path[:-1]:
            section = section[key]
        section[path[-1]] = value
    return copied


def logits_with(model: Any, raw: Mapping[str, Any]) -> torch.Tensor | None:
    """transformers' own with the same weights; None where it refuses the config or the weights don't fit it."""
    config_class = type(model.config)
    try:
        config = config_class(**{key: value for key, value in raw.items() if key not in NOT_TRIED - {"vision_config"}})
        config._attn_implementation = model.config._attn_implementation
        other = type(model)(config).eval()
        other.load_state_dict(model.state_dict())
    except (RuntimeError, TypeError, ValueError, KeyError, StrictDataclassError):
        return None
    with torch.inference_mode():
        logits: torch.Tensor = other(torch.tensor([TOKENS])).logits
    return logits


@pytest.mark.parametrize("family", FAMILIES)
def test_a_value_that_ours_makes_nothing_of_changes_nothing_in_transformers(models: Any, family: str) -> None:
    torch.manual_seed(3)
    model = models.FAMILIES[family]().eval()
    unsettle(model)
    raw = {**model.config.to_dict(), "architectures": [type(model).__name__]}
    base, expected = describe(raw), logits_with(model, raw)
    assert expected is not None
    same: dict[int, list[Change]] = {}  # a field's first odd value, its second, ...
    for path, value in leaves(raw):
        for which, odd in enumerate(odd_values(value)):
            with contextlib.suppress(UnsupportedModel):
                if describe(changed(raw, [(path, odd)])) == base:
                    same.setdefault(which, []).append((path, odd))
    ignored: list[Change] = []

    def ask(changes: list[Change]) -> int:
        """All at once; where transformers refuses that or answers otherwise, the halves. How many it took."""
        found = logits_with(model, changed(raw, changes))
        if found is not None and found.shape == expected.shape and (found - expected).abs().max() < 1e-5:
            return len(changes)
        if len(changes) > 1:
            return ask(changes[: len(changes) // 2]) + ask(changes[len(changes) // 2 :])
        ignored.extend(changes if found is not None else [])
        return 0

    num_taken = sum(ask(changes) for changes in same.values())
    assert not ignored
    assert num_taken > 5, "transformers was asked"
