"""What a checkpoint is for: to generate, to embed, or to rank; and how its rows become a vector (control speed).

    config.json's architectures   BertModel, ...ForSequenceClassification, ...ForCausalLM
    modules.json, *_Pooling/      sentence-transformers' description of an embedder: pooling, normalising
    sentence_bert_config.json     the longest text it was made for

Read by workers and gateways alike, so that both know the same. Must not know: torch, tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from antiphon.core.document.spec import ROLES_OF, Topology
from antiphon.core.errors import CheckpointInvalid, InvalidInput, UnsupportedModel
from antiphon.core.ids import Role
from antiphon.core.text.json_text import read_json_text

Task = Literal["generate", "embed", "rerank"]
Place = Literal["mean", "cls", "last", "max"]

ENCODERS = ("BertModel", "BertForMaskedLM", "BertForSequenceClassification")
_CLASSIFIER = "ForSequenceClassification"
_MODES: Mapping[str, Place] = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_lasttoken": "last",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolingFacts:
    """How a model that does not generate makes its vector."""

    task: Literal["embed", "rerank"]
    is_encoder: bool  # sees both ways, and has no KV cache
    place: Place  # which rows the vector is of
    normalise: bool = False  # an embedding has length 1
    num_classes: int = 0  # of its classification head; 0 = none: a ranker without one is asked for tokens' logits
    num_dims: int = 0  # of an embedding
    shorter_dims: tuple[int, ...] | None = None  # lengths an embedding may be cut to; (): any, None: none
    max_tokens: int | None = None  # longest text; None = as many as there are positions


def read_pooling(directory: Path, asked: str = "auto") -> PoolingFacts | None:
    """The facts of a checkpoint directory; None of one that generates.

    Args:
        directory: the checkpoint.
        asked: the document's ``model.task``; auto = as the checkpoint says.

    Raises:
        CheckpointInvalid: a file can't be read.
        InvalidInput: the model can't do what is asked.
        UnsupportedModel: it pools in a way that is not known.
    """
    config = _read(directory / "config.json")
    names = config.get("architectures")
    name = names[0] if isinstance(names, list) and names and isinstance(names[0], str) else ""
    modules = _modules(directory)
    detected: Task = "generate"
    if name.endswith(_CLASSIFIER):
        detected = "rerank"
    elif modules or (name.endswith("Model") and name):
        detected = "embed"
    task = detected if asked == "auto" else asked
    is_encoder = name in ENCODERS
    if task == "generate":
        if is_encoder or name.endswith((_CLASSIFIER, "Model")):
            raise InvalidInput(f"{name} has no head that generates", "spec.model.task")
        return None
    num_dims = int(config.get("hidden_size") or 0)
    max_tokens = _read(directory / "sentence_bert_config.json").get("max_seq_length")
    limit = int(max_tokens) if isinstance(max_tokens, int) and max_tokens > 0 else None
    if task == "rerank":
        is_classifier = name.endswith(_CLASSIFIER)
        if is_encoder and not is_classifier:
            raise InvalidInput(f"{name} has no head that ranks", "spec.model.task")
        labels = config.get("num_labels", len(config.get("id2label") or {}) or 2)
        if is_classifier and labels not in (1, 2):
            raise UnsupportedModel(f"{name} has {labels} classes; a ranker has one score, or two: no and yes", "num_labels")
        place: Place = "cls" if is_encoder else "last"
        return PoolingFacts(
            task="rerank",
            is_encoder=is_encoder,
            place=place,
            num_classes=int(labels) if is_classifier else 0,
            max_tokens=limit,
        )
    if name.endswith(_CLASSIFIER):
        raise InvalidInput(f"{name} ranks, it has no embeddings", "spec.model.task")
    return PoolingFacts(
        task="embed",
        is_encoder=is_encoder,
        place=_place(directory, modules, is_encoder=is_encoder),
        normalise=not modules or any(str(module.get("type", "")).endswith(".Normalize") for module in modules),
        num_dims=num_dims,
        shorter_dims=_shorter(config, num_dims),
        max_tokens=limit,
    )


def wrong_topology(topology: Topology, facts: PoolingFacts | None) -> str | None:
    """Why a model can't be split that way; None where it can."""
    if facts is None or topology is Topology.MONOLITH:
        return None
    if facts.is_encoder:
        return "an encoder is one forward pass, without layers to exchange or KV to hand over: expected monolith"
    if Role.PREFILL in ROLES_OF[topology]:
        return f"a model with the task {facts.task} decodes nothing: expected monolith or afd"
    return None


def check_topology(topology: Topology, facts: PoolingFacts | None) -> None:
    """Raises InvalidInput, naming the field, where a model can't be split that way."""
    why = wrong_topology(topology, facts)
    if why is not None:
        raise InvalidInput(why, "spec.topology")


def is_encoder(directory: Path, asked: str = "auto") -> bool:
    """Whether a checkpoint is one forward pass, without a KV cache. Raises as ``read_pooling``."""
    facts = read_pooling(directory, asked)
    return facts is not None and facts.is_encoder


def decoder_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """``config.json`` of a decoder with another head, as that of its family: what the head is, ``PoolingFacts`` says."""
    names = config.get("architectures") or [""]
    if not isinstance(names, list) or not isinstance(names[0], str):
        return config
    name = names[0]
    family = name.removesuffix(_CLASSIFIER) if name.endswith(_CLASSIFIER) else name.removesuffix("Model")
    if family == name:
        return config
    # The classes, and sentence-transformers' word on cut embeddings, change nothing below the head.
    harmless = ("num_labels", "is_matryoshka", "matryoshka_dimensions", "classifier_from_token", "method")
    return {**{k: v for k, v in config.items() if k not in harmless}, "architectures": [f"{family}ForCausalLM"]}


def _modules(directory: Path) -> list[Mapping[str, Any]]:
    path = directory / "modules.json"
    if not path.is_file():
        return []
    found = _load(path)
    if not isinstance(found, list) or not all(isinstance(module, dict) for module in found):
        raise CheckpointInvalid(f"{path}: expected a list of modules")
    for module in found:
        kind = str(module.get("type", ""))
        if not kind.endswith((".Transformer", ".Pooling", ".Normalize")):
            raise UnsupportedModel(f"{path}: a module of type {kind!r} is not supported", "modules.json")
    return found


def _place(directory: Path, modules: list[Mapping[str, Any]], *, is_encoder: bool) -> Place:
    pooling = next((m for m in modules if str(m.get("type", "")).endswith(".Pooling")), None)
    if pooling is None:
        return "mean" if is_encoder else "last"
    path = directory / str(pooling.get("path", "1_Pooling")) / "config.json"
    config = _read(path)
    if isinstance(mode := config.get("pooling_mode"), str):
        chosen = [f"pooling_mode_{mode}" if mode == "lasttoken" else f"pooling_mode_{mode}_token{'' if mode == 'cls' else 's'}"]
    else:
        chosen = [name for name, value in config.items() if name.startswith("pooling_mode_") and value is True]
    if len(chosen) != 1 or chosen[0] not in _MODES:
        raise UnsupportedModel(f"{path}: pooling by {', '.join(chosen) or 'nothing'} is not supported", "pooling_mode")
    place = _MODES[chosen[0]]
    if not is_encoder and place != "last":
        raise UnsupportedModel(f"{path}: decoders are pooled at their last token, not by {place}", "pooling_mode")
    return place


def _shorter(config: Mapping[str, Any], num_dims: int) -> tuple[int, ...] | None:
    """vLLM's words for embeddings that may be cut (arXiv 2205.13147)."""
    dims = config.get("matryoshka_dimensions")
    if isinstance(dims, list) and all(isinstance(dim, int) and 0 < dim <= num_dims for dim in dims) and dims:
        return tuple(dims)
    return () if config.get("is_matryoshka") is True else None


def _read(path: Path) -> Mapping[str, Any]:
    value = _load(path) if path.is_file() else {}
    if not isinstance(value, dict):
        raise CheckpointInvalid(f"{path}: expected a JSON object")
    return value


def _load(path: Path) -> Any:
    try:
        return read_json_text(path.read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointInvalid(f"{path}: can't be read as JSON: {error}") from error
