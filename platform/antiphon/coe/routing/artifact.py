"""The router artifact: one directory, checked file by file, no pickle (control speed).

    manifest.json    format, version, digest, and sha256 and size of every other file
    router.json      experts, categories, policies, gates, figures of training
    router.safetensors  token table, heads, landmarks, mean scores
    vocab.txt        the tokenizer's vocabulary
    words.txt        the words of the training prompts that the word head knows
    encoder.onnx     the slow path's sentence encoder, when it has one
    model_card.md, *.png  for people

The digest covers names and contents, so equal training gives an equal digest. Must not know: how it was trained, who serves it.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from antiphon.coe.routing.assessment import Fitted, Gate, Likeness, Mix, Ready
from antiphon.coe.routing.embedding import StaticEmbedding, TokenVectors, WordVectors
from antiphon.coe.routing.encoder import SentenceEncoder
from antiphon.coe.routing.wordpiece import WordPiece
from antiphon.core.errors import CheckpointInvalid
from antiphon.core.text.json_text import read_json_text

FORMAT = "antiphon-coe-router"
FORMAT_VERSION = 9
# 2 has no words, 3 no points harmless only for familiar prompts, 4 no caution, 5 no plain router, 6 words of a window and no leads,
# 7 no likeness, 8 no spelling.
READ_VERSIONS = (2, 3, 4, 5, 6, 7, 8, 9)
MANIFEST = "manifest.json"
_JSON, _ARRAYS, _VOCABULARY, _ENCODER = "router.json", "router.safetensors", "vocab.txt", "encoder.onnx"
_WORDS = "words.txt"

Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class ArtifactExpert:
    """An expert as the artifact knows it."""

    name: str
    active_params_b: float | None
    mean_score: float
    added_from_probes: int = 0  # probes it joined with after training; 0 = in the table


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyPoint:
    """A cost weight and what it gave on unseen rows in training."""

    weight: float  # score given up for the most expensive expert against a free one
    avg_cost: float
    score: float
    experts: tuple[int, ...]  # the experts worth having at this weight
    cost_from: float = 0.0  # familiarity from which cost counts
    leads: float = 1.0  # share that counts of the lead that is asked of experts
    harmless: bool = True  # on datasets that were left out no worse than the general expert, within what is allowed


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedPath:
    """A path as it is served."""

    fitted: Fitted
    mix: Mix
    gate: Gate
    quick: Ready

    @classmethod
    def of(cls, fitted: Fitted, mix: Mix, gate: Gate) -> ServedPath:
        """The path, made ready for one prompt at a time."""
        return cls(fitted=fitted, mix=mix, gate=gate, quick=Ready(fitted, mix, gate))


@dataclass(frozen=True, slots=True, kw_only=True)
class Artifact:
    """A loaded router."""

    digest: str
    experts: tuple[ArtifactExpert, ...]
    categories: tuple[str, ...]
    classes: tuple[str, ...]  # categories within datasets
    general: int  # index of the expert that uncertain prompts go to
    mapping: tuple[int, ...]  # category → expert under the budget of training
    allowed: tuple[bool, ...]  # experts that the subset of training keeps
    costs: tuple[float, ...]  # of each expert, in the cost unit of the frontier
    policies: Mapping[str, int]  # policy → point of the frontier
    frontier: tuple[PolicyPoint, ...]
    embedding: StaticEmbedding
    fast: ServedPath
    slow: ServedPath | None
    encoder: SentenceEncoder | None  # with a slow path
    training: Mapping[str, Any]  # seed, recipe, digests and figures, for people and for judging

    @property
    def expert_names(self) -> tuple[str, ...]:
        """Names in the order of every per-expert array."""
        return tuple(expert.name for expert in self.experts)


def _path_arrays(prefix: str, path: ServedPath) -> dict[str, Array]:
    fitted = path.fitted
    return {
        f"{prefix}.heads": fitted.heads_DH,
        f"{prefix}.bias": fitted.bias_H,
        f"{prefix}.category_of_class": fitted.category_F,
        f"{prefix}.class_scores": fitted.class_scores_FM,
        f"{prefix}.category_scores": fitted.category_scores_CM,
        f"{prefix}.plain_scores": fitted.plain_scores_FM,
        f"{prefix}.mean": fitted.mean_M,
        f"{prefix}.landmarks": fitted.landmarks_ND.astype(np.float16),
        f"{prefix}.centres": fitted.likeness.centres_FK,
        f"{prefix}.centre_bias": fitted.likeness.bias_F,
    }


def _path_json(path: ServedPath) -> dict[str, Any]:
    return {
        "temperature": path.fitted.temperature,
        "general": path.fitted.general,
        "mix": asdict(path.mix),
        "gate": asdict(path.gate),
    }


def as_stored(path: ServedPath) -> ServedPath:
    """The path with the rounding that storing brings, so that figures of training are those of the served router."""
    return _read_path("path", {k: np.asarray(v) for k, v in _path_arrays("path", path).items()}, _path_json(path))


def _read_path(prefix: str, arrays: Mapping[str, Array], value: Mapping[str, Any]) -> ServedPath:
    return ServedPath.of(
        fitted=Fitted(
            heads_DH=arrays[f"{prefix}.heads"],
            bias_H=arrays[f"{prefix}.bias"],
            temperature=float(value["temperature"]),
            category_F=arrays[f"{prefix}.category_of_class"],
            class_scores_FM=arrays[f"{prefix}.class_scores"],
            category_scores_CM=arrays[f"{prefix}.category_scores"],
            plain_scores_FM=arrays.get(f"{prefix}.plain_scores", arrays[f"{prefix}.class_scores"]),  # asked by no format before 6
            mean_M=arrays[f"{prefix}.mean"],
            general=int(value.get("general", arrays[f"{prefix}.mean"].argmax())),  # formats before 5 don't say it
            landmarks_ND=arrays[f"{prefix}.landmarks"].astype(np.float32),
            likeness=_read_likeness(prefix, arrays),
        ),
        mix=Mix(**{"strange_hold": 0.5 * value["mix"].get("hold", 0.0), **value["mix"]}),  # before format 7, by less the stranger
        gate=Gate(**value["gate"]),
    )


def _read_likeness(prefix: str, arrays: Mapping[str, Array]) -> Likeness:
    if f"{prefix}.centres" not in arrays:  # before format 8
        return Likeness.none(len(arrays[f"{prefix}.category_of_class"]))
    return Likeness(centres_FK=arrays[f"{prefix}.centres"], bias_F=arrays[f"{prefix}.centre_bias"])


def _vectors(prefix: str, vectors: TokenVectors) -> dict[str, Array]:
    return {f"{prefix}.table": vectors.table_VD, f"{prefix}.scale": vectors.scale_V}


def _read_vectors(prefix: str, arrays: Mapping[str, Array]) -> TokenVectors:
    return TokenVectors(table_VD=arrays[f"{prefix}.table"], scale_V=arrays[f"{prefix}.scale"])


def _read_embedding(value: Mapping[str, Any]) -> dict[str, Any]:
    """Formats before 7 have words of the window alone."""
    return {"whole_words": False, **value, "known_frames": frozenset(value.get("known_frames", ()))}


def _read_words(directory: Path, arrays: Mapping[str, Array]) -> WordVectors | None:
    if "words.table" not in arrays:
        return None
    text = (directory / _WORDS).read_text(encoding="utf-8")
    num_texts_U = arrays.get("words.num_texts")  # from format 9
    return WordVectors(
        words=tuple(text.removesuffix("\n").split("\n")), vectors=_read_vectors("words", arrays), num_texts_U=num_texts_U
    )


def write_artifact(artifact: Artifact, directory: Path, extra: Mapping[str, bytes]) -> str:
    """Write all files, the manifest last, and return the digest. ``extra`` are files for people. Replaces an older artifact whole.

    Raises:
        CheckpointInvalid: the directory holds something that is no artifact, or can't be written.
    """
    if directory.exists() and any(directory.iterdir()) and not (directory / MANIFEST).is_file():
        raise CheckpointInvalid(f"{directory} is not empty and no router artifact; it is left alone")
    arrays = {
        **_vectors("embedding", artifact.embedding.near),
        **({} if artifact.embedding.topics is None else _vectors("topics", artifact.embedding.topics)),
        **_path_arrays("fast", artifact.fast),
    }
    if artifact.slow is not None:
        arrays |= _path_arrays("slow", artifact.slow)
    words = artifact.embedding.words
    if words is not None:
        arrays |= _vectors("words", words.vectors)
        arrays |= {} if words.num_texts_U is None else {"words.num_texts": words.num_texts_U}
    files = {
        _JSON: _router_json(artifact),
        _ARRAYS: save({name: np.ascontiguousarray(array) for name, array in sorted(arrays.items())}),
        _VOCABULARY: ("\n".join(artifact.embedding.tokens.vocabulary) + "\n").encode(),
        **({} if words is None else {_WORDS: ("\n".join(words.words) + "\n").encode()}),
        **extra,
    }
    if artifact.slow is not None and artifact.encoder is not None:
        files[_ENCODER] = artifact.encoder.path.read_bytes()
    manifest = _manifest(files)
    staging = directory.with_name(f".{directory.name}.{os.getpid()}.part")
    try:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        for name, data in files.items():
            (staging / name).write_bytes(data)
        (staging / MANIFEST).write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n")
        if directory.exists():
            old = directory.with_name(f".{directory.name}.{os.getpid()}.old")
            shutil.rmtree(old, ignore_errors=True)
            directory.rename(old)
            staging.rename(directory)
            shutil.rmtree(old)
        else:
            staging.rename(directory)
    except OSError as error:
        raise CheckpointInvalid(f"artifact {directory} can't be written: {error}") from error
    return str(manifest["digest"])


def _router_json(artifact: Artifact) -> bytes:
    value = {
        "experts": [asdict(expert) for expert in artifact.experts],
        "categories": artifact.categories,
        "classes": artifact.classes,
        "general": artifact.general,
        "mapping": artifact.mapping,
        "allowed": artifact.allowed,
        "costs": artifact.costs,
        "policies": dict(artifact.policies),
        "frontier": [asdict(point) for point in artifact.frontier],
        "embedding": {
            "num_head_chars": artifact.embedding.num_head_chars,
            "num_tail_chars": artifact.embedding.num_tail_chars,
            "max_tokens": artifact.embedding.max_tokens,
            "whole_words": artifact.embedding.whole_words,
            "known_frames": sorted(artifact.embedding.known_frames),
        },
        "fast": _path_json(artifact.fast),
        "slow": None if artifact.slow is None else _path_json(artifact.slow),
        "encoder_max_tokens": None if artifact.encoder is None else artifact.encoder.max_tokens,
        "training": dict(artifact.training),
    }
    return (json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n").encode()


def _manifest(files: Mapping[str, bytes]) -> dict[str, Any]:
    listed = {name: {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)} for name, data in files.items()}
    return {"format": FORMAT, "version": FORMAT_VERSION, "digest": _digest(listed), "files": listed}


def _digest(listed: Mapping[str, Mapping[str, Any]]) -> str:
    text = json.dumps({name: listed[name]["sha256"] for name in sorted(listed)}, sort_keys=True)
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()


def load_artifact(directory: Path, *, slow_path: bool = True, digest: str | None = None) -> Artifact:
    """Check every file and load. ``slow_path=False`` leaves the sentence encoder out; ``digest`` is the one it must have.

    Raises:
        CheckpointInvalid: something is missing, truncated, changed, of another version or digest; the message names the artifact.
    """
    listed = _checked_manifest(directory, digest)
    try:
        value = read_json_text((directory / _JSON).read_bytes())
        arrays: dict[str, Array] = load_file(directory / _ARRAYS)
        tokens = WordPiece.from_file(directory / _VOCABULARY)
        encoder = None
        if slow_path and value["slow"] is not None and _ENCODER in listed["files"]:
            encoder = SentenceEncoder(directory / _ENCODER, tokens, int(value["encoder_max_tokens"]))
        artifact = Artifact(
            digest=str(listed["digest"]),
            experts=tuple(ArtifactExpert(**expert) for expert in value["experts"]),
            categories=tuple(value["categories"]),
            classes=tuple(value["classes"]),
            general=int(value["general"]),
            mapping=tuple(value["mapping"]),
            allowed=tuple(value["allowed"]),
            costs=tuple(value["costs"]),
            policies={name: int(point) for name, point in value["policies"].items()},
            frontier=tuple(PolicyPoint(**{**point, "experts": tuple(point["experts"])}) for point in value["frontier"]),
            embedding=StaticEmbedding(
                tokens=tokens,
                near=_read_vectors("embedding", arrays),
                topics=_read_vectors("topics", arrays) if "topics.table" in arrays else None,
                words=_read_words(directory, arrays),
                **_read_embedding(value["embedding"]),
            ),
            fast=_read_path("fast", arrays, value["fast"]),
            slow=None if encoder is None else _read_path("slow", arrays, value["slow"]),
            encoder=encoder,
            training=value["training"],
        )
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise CheckpointInvalid(f"artifact {directory}: {type(error).__name__}: {error}") from error
    _check_shapes(artifact, directory)
    artifact.embedding.make_ready()
    return artifact


def _checked_manifest(directory: Path, digest: str | None) -> dict[str, Any]:
    try:
        manifest = read_json_text((directory / MANIFEST).read_bytes())
    except OSError as error:
        raise CheckpointInvalid(f"artifact {directory}: {MANIFEST} can't be read: {error}") from error
    except ValueError as error:
        raise CheckpointInvalid(f"artifact {directory}: {MANIFEST} is not JSON: {error}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise CheckpointInvalid(f"artifact {directory}: is no router artifact")
    if manifest.get("version") not in READ_VERSIONS:
        raise CheckpointInvalid(
            f"artifact {directory}: has format version {manifest.get('version')}, this router reads {READ_VERSIONS[0]} "
            f"to {READ_VERSIONS[-1]}; train it again"
        )
    files = manifest.get("files")
    if not isinstance(files, dict) or not {_JSON, _ARRAYS, _VOCABULARY} <= files.keys():
        raise CheckpointInvalid(f"artifact {directory}: {MANIFEST} lacks files")
    for name, entry in files.items():
        path = directory / name
        if path.name != name or not path.is_file():
            raise CheckpointInvalid(f"artifact {directory}: {name} is missing")
        if path.stat().st_size != entry["bytes"]:
            raise CheckpointInvalid(f"artifact {directory}: {name} is truncated: {path.stat().st_size} of {entry['bytes']} bytes")
        with path.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != entry["sha256"]:
                raise CheckpointInvalid(f"artifact {directory}: {name} has been changed: its digest differs")
    if _digest(files) != manifest.get("digest"):
        raise CheckpointInvalid(f"artifact {directory}: {MANIFEST} has been changed: its digest differs")
    if digest is not None and digest != manifest["digest"]:
        raise CheckpointInvalid(f"artifact {directory}: has digest {manifest['digest']}, expected {digest}")
    return manifest


def _check_shapes(artifact: Artifact, directory: Path) -> None:
    num_experts, num_categories = len(artifact.experts), len(artifact.categories)
    for name, path in (("fast", artifact.fast), ("slow", artifact.slow)):
        if path is None:
            continue
        fitted, num_classes = path.fitted, len(artifact.classes)
        width = num_classes + num_experts + (num_classes if artifact.embedding.words is not None else 0) + fitted.num_directions
        good = (
            fitted.heads_DH.ndim == 2
            and fitted.heads_DH.shape[1] == width == len(fitted.bias_H)
            and (not path.mix.asks_words or artifact.embedding.words is not None)
            and fitted.category_F.shape == (num_classes,)
            and bool(((fitted.category_F >= 0) & (fitted.category_F < num_categories)).all())
            and fitted.class_scores_FM.shape == (num_classes, num_experts)
            and fitted.category_scores_CM.shape == (num_categories, num_experts)
            and fitted.plain_scores_FM.shape == (num_classes, num_experts)
            and fitted.mean_M.shape == (num_experts,)
            and fitted.likeness.centres_FK.shape[:1] == fitted.likeness.bias_F.shape == (num_classes,)
            and fitted.landmarks_ND.shape[1:] == (len(fitted.heads_DH),)
        )
        if not good:
            raise CheckpointInvalid(f"artifact {directory}: arrays of the {name} path don't fit {_JSON}")
    num_tokens = len(artifact.embedding.tokens.vocabulary)
    vectors = [artifact.embedding.near, *([] if artifact.embedding.topics is None else [artifact.embedding.topics])]
    known = artifact.embedding.words
    if known is not None and (
        not len(known.words) == len(known.vectors.scale_V) == len(known.vectors.table_VD)
        or (known.num_texts_U is not None and known.num_texts_U.shape != (len(known.words),))
    ):
        raise CheckpointInvalid(f"artifact {directory}: the words' vectors don't fit {_WORDS}")
    if len(artifact.fast.fitted.heads_DH) != artifact.embedding.num_dimensions or any(
        len(found.scale_V) != num_tokens or len(found.table_VD) != num_tokens for found in vectors
    ):
        raise CheckpointInvalid(f"artifact {directory}: the embedding doesn't fit heads or vocabulary")
    points = artifact.policies.values()
    if not all(0 <= point < len(artifact.frontier) for point in points) or len(artifact.costs) != num_experts:
        raise CheckpointInvalid(f"artifact {directory}: policies or costs don't fit the frontier")
    if not (len(artifact.allowed) == num_experts > artifact.general >= 0 and len(artifact.mapping) == num_categories):
        raise CheckpointInvalid(f"artifact {directory}: {_JSON} doesn't fit its experts and categories")
