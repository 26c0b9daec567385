"""The library of models: dimension fields of public ``config.json`` files under short names (control speed).

Must not know: hardware.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

from antiphon.core.errors import CheckpointInvalid, UnknownModel
from antiphon.planner.cost.config import shape_of
from antiphon.planner.cost.formats import Formats
from antiphon.planner.cost.shape import ModelShape

# Quantisation methods of checkpoints by the name in quantization_config.quant_method, as weight formats.
QUANTISATIONS = {"fp8": "fp8", "compressed-tensors": "int8", "awq": "int4", "gptq": "int4", "mxfp4": "fp4"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """A model to plan for: its shape, and the formats it is usually served in."""

    name: str
    title: str
    source: str
    shape: ModelShape
    formats: Formats


def model_names() -> tuple[str, ...]:
    """Names in the library, sorted."""
    return tuple(sorted(_entries()))


def _entries() -> dict[str, Traversable]:
    """The library's files by name; each maker has a folder."""
    makers = resources.files("antiphon.planner").joinpath("data", "models").iterdir()
    files = [file for maker in makers if maker.is_dir() for file in maker.iterdir()]
    return {file.name.removesuffix(".json"): file for file in files if file.name.endswith(".json")}


def find_model(name: str, field: str = "model") -> Model:
    """The library's model of that name; ``field`` is what named it.

    Raises:
        UnknownModel: there is none.
    """
    entries = _entries()
    if name not in entries:
        raise UnknownModel(f"{field}: {name!r} is neither a path nor in the library; known are {', '.join(sorted(entries))}", field)
    entry: dict[str, Any] = json.loads(entries[name].read_text())
    return Model(
        name=name,
        title=entry["title"],
        source=entry["source"],
        shape=shape_of(entry["config"], name),
        formats=Formats(**entry["formats"]),
    )


def read_model(path: Path) -> Model:
    """The model of a checkpoint directory or of a ``config.json``.

    Raises:
        CheckpointInvalid: there is no readable config.
        InvalidInput, UnsupportedModel: see ``shape_of``.
    """
    file = path / "config.json" if path.is_dir() else path
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointInvalid(f"{file}: {error}") from error
    if not isinstance(config, dict):
        raise CheckpointInvalid(f"{file}: is no JSON object")
    name = file.parent.name or file.stem
    return Model(name=name, title=name, source=str(file), shape=shape_of(config, name), formats=formats_of(config))


def formats_of(config: dict[str, Any]) -> Formats:
    """The formats that a config says: its dtype, and the weight format of its quantisation."""
    inner = config["text_config"] if isinstance(config.get("text_config"), dict) else config
    dtype = str(config.get("dtype") or config.get("torch_dtype") or inner.get("torch_dtype") or "bfloat16")
    base = {"float32": "fp32", "float16": "fp16"}.get(dtype.removeprefix("torch."), "bf16")
    quantisation = config["quantization_config"] if isinstance(config.get("quantization_config"), dict) else {}
    weights = QUANTISATIONS.get(str(quantisation.get("quant_method", "")), base)
    compute = weights if weights in ("fp8", "int8") else base
    return Formats(weights=weights, compute=compute, kv=base, local_kv=base, a2f=base, f2a=base)
