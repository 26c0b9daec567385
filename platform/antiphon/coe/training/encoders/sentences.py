"""Sentence embeddings of many texts: each distinct one computed once, and kept for the next time (control speed, offline).

Wrapped, re-cased and cut prompts mostly have the tokens of the prompt itself, so that a fraction of the texts is computed. The
store is one file per encoder and length in the cache directory. Must not know: tables, categories.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt

from antiphon.coe.routing.assets import cache_directory, keep
from antiphon.coe.routing.encoder import SentenceEncoder
from antiphon.coe.routing.wordpiece import WordPiece
from antiphon.coe.training.encoders.encoder_graph import served_graph
from antiphon.core.errors import CheckpointInvalid

Floats = npt.NDArray[np.float32]

_MAX_KEPT = 100_000  # rows of a store, about 150 MB; when there are more, those that were not asked for are dropped
_DIMENSIONS = 384
_ROW = np.dtype([("key", np.uint64), ("vector", np.float32, (_DIMENSIONS,))])


def served_encoder(published: Path, tokens: WordPiece, max_tokens: int) -> SentenceEncoder:
    """The published encoder, rewritten for serving.

    Raises:
        CheckpointInvalid: it has another layout than expected, or the cache directory can't be written.
    """
    data = served_graph(published.read_bytes())
    path = cache_directory() / "coe" / f"{hashlib.sha256(data).hexdigest()[:16]}-encoder.onnx"
    try:
        if not path.is_file() or path.read_bytes() != data:
            keep(path, data)
    except OSError as error:
        raise CheckpointInvalid(f"the encoder can't be written to {path.parent}: {error}") from error
    return SentenceEncoder(path, tokens, max_tokens)


def encode_sentences(encoder: SentenceEncoder, texts: Sequence[str]) -> Floats:
    """Embeddings [len(texts), 384], each computed alone, as it is served."""
    ids = [encoder.ids(text) for text in texts]
    keys = np.array([_key(row) for row in ids], np.uint64)
    path = _path(encoder)
    kept = _read(path)
    known = {int(key): i for i, key in enumerate(kept["key"])}
    wanted: dict[int, list[int]] = {int(key): row for key, row in zip(keys, ids, strict=True) if int(key) not in known}
    if wanted:
        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            vectors = list(pool.map(lambda row: encoder.encode_ids([row])[0], wanted.values()))
        new = np.zeros(len(wanted), _ROW)
        new["key"], new["vector"] = list(wanted), vectors
        if len(kept) + len(new) > _MAX_KEPT:
            asked = set(keys.tolist())
            kept = kept[[int(key) in asked for key in kept["key"]]]
        kept = np.concatenate([kept, new])
        known = {int(key): i for i, key in enumerate(kept["key"])}
        _write(path, kept)
    result: Floats = kept["vector"][[known[int(key)] for key in keys]]
    return result


def _key(ids: Sequence[int]) -> int:
    return int.from_bytes(hashlib.blake2b(np.array(ids, np.int32).tobytes(), digest_size=8).digest())


def _path(encoder: SentenceEncoder) -> Path:
    digest = hashlib.sha256(encoder.path.read_bytes()).hexdigest()[:16]
    return cache_directory() / "coe" / f"sentences-{digest}-{encoder.max_tokens}.npy"


def _read(path: Path) -> npt.NDArray[np.void]:
    try:
        kept: npt.NDArray[np.void] = np.load(path, allow_pickle=False)
    except (OSError, ValueError):
        return np.zeros(0, _ROW)
    return kept if kept.dtype == _ROW else np.zeros(0, _ROW)


def _write(path: Path, rows: npt.NDArray[np.void]) -> None:
    try:
        keep(path, rows)
    except OSError:
        return  # a read-only cache costs time, not correctness
