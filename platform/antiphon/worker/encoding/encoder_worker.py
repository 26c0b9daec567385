"""Vectors of whole texts by an encoder and its pooler (step speed).

A fault in a batch is found by halving it, and ends the request it comes of alone. Must not know: queues, text.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch

from antiphon.core.errors import ErrorInfo, InvalidInput
from antiphon.core.request import Request
from antiphon.models.encoders.bert import Bert
from antiphon.models.pooling.pooler import Pooler

logger = logging.getLogger(__name__)

_MAX_FAULTS = 8  # in a row, with no vector between: the worker is to blame, and a new one is started


class EncoderWorker:
    """Owns the encoder's weights."""

    def __init__(self, encoder: Bert, pooler: Pooler) -> None:
        self.encoder = encoder
        self.pooler = pooler
        self._num_faults = 0

    @property
    def resident_bytes(self) -> dict[str, int]:
        """Checkpoint tensors that are held, with their bytes."""
        return {**self.encoder.resident_bytes, **self.pooler.resident_bytes}

    def check(self, request: Request) -> None:
        """Refuse what the model can't do. Raises InvalidInput."""
        pooling = request.sampling.pooling
        self.pooler.check(pooling)
        first = None if pooling is None else pooling.num_first_tokens
        if first is not None and (first > len(request.prompt_token_ids) or self.encoder.config.num_types < 2):
            raise InvalidInput(f"{first} tokens of a first text", "pooling.num_first_tokens")

    def compute(self, requests: Sequence[Request]) -> list[tuple[float, ...] | ErrorInfo]:
        """The vector of each, or why there is none."""
        try:
            with torch.inference_mode():
                found = self._compute(requests)
        except Exception as error:
            if len(requests) == 1:
                self._num_faults += 1
                if self._num_faults >= _MAX_FAULTS:
                    raise
                logger.exception("request %s failed", requests[0].request_id)
                return [ErrorInfo.internal(type(error).__name__)]
            middle = len(requests) // 2
            return self.compute(requests[:middle]) + self.compute(requests[middle:])
        self._num_faults = 0
        return found

    def _compute(self, requests: Sequence[Request]) -> list[tuple[float, ...] | ErrorInfo]:
        firsts = [None if r.sampling.pooling is None else r.sampling.pooling.num_first_tokens for r in requests]
        found: list[tuple[float, ...] | ErrorInfo] = []
        for x_LD in self.encoder.rows([request.prompt_token_ids for request in requests], firsts):
            vector = self.pooler.of_rows(x_LD)
            is_finite = bool(torch.isfinite(vector).all())
            found.append(tuple(vector.tolist()) if is_finite else ErrorInfo.internal("the model's vector is non-finite"))
        return found
