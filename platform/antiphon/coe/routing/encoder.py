"""The slow path: a sentence encoder in ONNX, int8 on one core (request speed, milliseconds).

Imports its runtime only when constructed, so that a router without a slow path never pays for it. Must not know: categories.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from antiphon.coe.routing.framing.core import without_framing
from antiphon.coe.routing.wordpiece import WordPiece, window
from antiphon.core.errors import CheckpointInvalid

Floats = npt.NDArray[np.float32]

_CHARS_PER_TOKEN = 8  # characters looked at per token; bounds the time for any input


class SentenceEncoder:
    """MiniLM: mean of the last layer's rows, normalised. One session, one thread; calls may come from any thread."""

    def __init__(self, path: Path, tokens: WordPiece, max_tokens: int) -> None:
        """``max_tokens`` includes [CLS] and [SEP]; classifiers are trained at the same length.

        Raises:
            CheckpointInvalid: the file is no such model, or onnxruntime is not installed.
        """
        self.tokens = tokens
        self.max_tokens = max_tokens
        self.path = path
        try:
            import onnxruntime
        except ImportError as error:
            raise CheckpointInvalid("the sentence encoder needs onnxruntime: pip install 'antiphon[coe]'") from error
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.inter_op_num_threads = 1
        options.enable_cpu_mem_arena = False  # resident memory matters more here than the last tenth of a millisecond
        try:
            self._session: Any = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's errors share no narrower base
            raise CheckpointInvalid(f"sentence encoder {path.name} can't be loaded: {error}") from error
        self._inputs = [declared.name for declared in self._session.get_inputs()]

    def encode(self, text: str) -> Floats:
        """Embedding [384] of the first tokens of ``text`` without its framing, of length 1."""
        embedding: Floats = self.encode_ids([self.ids(text)])[0]
        return embedding

    def ids(self, text: str) -> list[int]:
        """The tokens that ``encode`` looks at, without special ones: texts with equal ids have equal embeddings."""
        seen = window(without_framing(text), _CHARS_PER_TOKEN * self.max_tokens, 0)
        return self.tokens.encode(seen, self.max_tokens - 2)

    def encode_ids(self, rows: Sequence[Sequence[int]]) -> Floats:
        """Embeddings [len(rows), 384] of rows of ids without special tokens; all rows have one length."""
        batch = np.array([[self.tokens.cls_id, *row, self.tokens.sep_id] for row in rows], np.int64)
        known = {"input_ids": batch, "attention_mask": np.ones_like(batch), "token_type_ids": np.zeros_like(batch)}
        mean: Floats = self._session.run(None, {name: known[name] for name in self._inputs})[0].mean(axis=1)
        normal: Floats = (mean / np.linalg.norm(mean, axis=1, keepdims=True)).astype(np.float32)
        return normal
