"""A model's loss on a calibration file, with or without skipping experts (control speed around the hot halves).

The halves that serve compute it, whole texts at once. Must not know: how thresholds are searched.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from antiphon.core.errors import InvalidInput
from antiphon.core.ids import FFNShard
from antiphon.gateway.text.tokenizer import TextModel
from antiphon.models.attention.kv_cache import TORCH_DTYPES, KVCache
from antiphon.models.attention.paged import AttentionBatch, Chunk
from antiphon.models.cache_layout import kv_layout
from antiphon.models.decoder import AttentionHalves, FFNHalves
from antiphon.models.experts.skipping import ExpertSkipping
from antiphon.models.families import describe
from antiphon.models.loading.checkpoint import Checkpoint

_BATCH_TOKENS = 1024  # computed at once
_BLOCK_TOKENS = 16

Texts = Sequence[tuple[int, ...]]


def read_calibration(path: Path, checkpoint_dir: Path, *, max_tokens: int, max_len: int) -> Texts:
    """Token ids of the texts of a JSON-lines file: ``{"text": ...}``, ``{"messages": [...]}`` or ``{"token_ids": [...]}`` a line.

    Args:
        path: The file.
        checkpoint_dir: Has the tokenizer and, for messages, the chat template; not needed for token ids.
        max_tokens: Of the file, at most; the line that reaches it is cut.
        max_len: Of a line, at most; longer ones are cut.

    Raises:
        InvalidInput: a line is none of these, or there is not one with two tokens.
        CheckpointInvalid: the tokenizer can't be read.
    """
    texts: list[tuple[int, ...]] = []
    left = max_tokens
    model: TextModel | None = None
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise InvalidInput(f"{path} can't be read: {error}", "calibration") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            raw: Any = json.loads(line)
        except ValueError as error:
            raise InvalidInput(f"{where}: not JSON: {error}", "calibration") from error
        if not isinstance(raw, dict) or not {"text", "messages", "token_ids"} & raw.keys():
            raise InvalidInput(f"{where}: expected an object with text, messages or token_ids", "calibration")
        if "token_ids" in raw:
            ids = raw["token_ids"]
            if not isinstance(ids, list) or not all(isinstance(each, int) and each >= 0 for each in ids):
                raise InvalidInput(f"{where}: token_ids are not token ids", "calibration")
        else:
            model = TextModel.load(checkpoint_dir) if model is None else model
            field = "text" if "text" in raw else "messages"
            if not isinstance(raw[field], str if field == "text" else list):
                raise InvalidInput(f"{where}: {field} is not what it should be", "calibration")
            ids = model.encode(raw["text"]) if field == "text" else model.encode_chat(raw["messages"], add_generation_prompt=False)
        taken = tuple(ids[: min(max_len, left)])
        if len(taken) >= 2:
            texts.append(taken)
            left -= len(taken)
        if left < 2:
            break
    if not texts:
        raise InvalidInput(f"{path}: holds no text of two tokens", "calibration")
    return texts


class CalibratedModel:
    """A model and the texts it is measured on.

    Args:
        checkpoint_dir: The model.
        texts: Token ids of each text.
        dtype: float32 or bfloat16.

    Raises:
        CheckpointInvalid, UnsupportedModel: the model can't be served.
        InvalidInput: the format is unknown, or a text is not the model's.
    """

    def __init__(self, checkpoint_dir: Path, texts: Texts, *, dtype: str) -> None:
        if dtype not in ("bfloat16", "float32"):
            raise InvalidInput(f"dtype {dtype!r}, expected bfloat16 or float32", "dtype")
        checkpoint = Checkpoint.open(checkpoint_dir)
        self.config = describe(checkpoint.config)
        longest = max(len(text) for text in texts)
        if longest > self.config.max_position:
            raise InvalidInput(f"a text of {longest} tokens, the model takes {self.config.max_position}", "calibration")
        if any(token >= self.config.vocab_size for text in texts for token in text):
            raise InvalidInput(f"a token id beyond the model's {self.config.vocab_size}", "calibration")
        device, format_ = torch.device("cpu"), TORCH_DTYPES[dtype]
        self._attention = AttentionHalves(self.config, checkpoint, format_, device, longest)
        self._ffn = FFNHalves(self.config, checkpoint, format_, device, FFNShard())
        self._batches = list(_batches(texts))
        num_blocks = max(sum(-(-len(text) // _BLOCK_TOKENS) for text in batch) for batch in self._batches)
        self._cache = KVCache(kv_layout(self.config, format_, _BLOCK_TOKENS), num_blocks, device)
        self.num_predicted = sum(len(text) - 1 for text in texts)

    def measure(self, skipping: ExpertSkipping | None) -> tuple[float, float]:
        """Nats per predicted token, and the share of the experts chosen by rows that was skipped."""
        self._attention.skip(skipping)
        routers = self._attention.routers.values()
        chosen, skipped = sum(r.num_chosen for r in routers), sum(r.num_skipped for r in routers)
        with torch.inference_mode():
            loss = sum(self._loss(batch) for batch in self._batches)
        num_chosen = sum(r.num_chosen for r in routers) - chosen
        num_skipped = sum(r.num_skipped for r in routers) - skipped
        return loss / self.num_predicted, num_skipped / num_chosen if num_chosen else 0.0

    def _loss(self, texts: Texts) -> float:
        """Summed over the batch's predicted tokens."""
        chunks: list[Chunk] = []
        slots: list[torch.Tensor] = []
        row = first_block = 0
        for text in texts:
            num_blocks = -(-len(text) // _BLOCK_TOKENS)
            context = self._cache.slots(list(range(first_block, first_block + num_blocks)), 0, len(text))
            chunks.append(Chunk(first_row=row, num_rows=len(text), context_slots=context))
            slots.append(context)
            row, first_block = row + len(text), first_block + num_blocks
        state = self._attention.begin(
            torch.tensor([token for text in texts for token in text]),
            AttentionBatch(
                positions_T=torch.cat([torch.arange(len(text)) for text in texts]),
                slots_T=torch.cat(slots),
                block_size_tokens=_BLOCK_TOKENS,
                decode_blocks_BM=None,
                decode_lens_B=None,
                chunks=chunks,
            ),
        )
        away: dict[int, torch.Tensor] = {}  # results by stream
        for layer in range(self.config.num_layers):
            for out in self._attention.attend(layer, state, self._cache):
                routing = out.routing
                ids, weights = (None, None) if routing is None else (routing.ids_TK.int(), routing.weights_TK)
                away[out.stream] = self._ffn.compute(out.ffn, out.rows_TD, ids, weights)
            self._attention.combine(layer, state, [away.pop(stream) for stream in self._attention.streams_due(layer)])
        losses = []
        for chunk, text in zip(chunks, texts, strict=True):
            last = chunk.first_row + chunk.num_rows - 1
            logits_RV = self._attention.logits(state.x_TD[chunk.first_row : last])
            losses.append(float(F.cross_entropy(logits_RV, torch.tensor(text[1:]), reduction="sum")))
        return sum(losses)


def _batches(texts: Texts) -> Iterator[Texts]:
    batch: list[tuple[int, ...]] = []
    for text in texts:
        if batch and sum(len(each) for each in batch) + len(text) > _BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(text)
    yield batch
