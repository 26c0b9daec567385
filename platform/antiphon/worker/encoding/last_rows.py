"""Vectors of decoders that do not generate: pooled from each request's last row (step).

Must not know: how rows are computed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from antiphon.core.errors import ErrorInfo
from antiphon.core.step import ModelRunnerOutput
from antiphon.models.decoder import AttentionHalves
from antiphon.models.pooling.pooler import Pooler
from antiphon.worker.request_row import RequestRow
from antiphon.worker.sampler import all_finite


def pool_rows(
    pooler: Pooler,
    halves: AttentionHalves,
    finals: Sequence[torch.Tensor],
    rows: Sequence[RequestRow],
    refuse: Callable[[RequestRow], ErrorInfo],
) -> ModelRunnerOutput:
    """A vector for each of ``rows``, whose last row, [1, D], is in ``finals``; ``refuse``: why a request without one ends."""
    output = ModelRunnerOutput()
    for x_1D, row in zip(finals, rows, strict=True):
        pooling = row.sampling.params.pooling
        assert pooling is not None  # seen when the request came
        vector = pooler.of_last(halves, x_1D[0], pooling)
        if row.bad_at is not None or not all_finite(vector):
            output.errors[row.request_id] = refuse(row)
            continue
        output.sampled_token_ids[row.request_id] = (0,)
        output.vectors[row.request_id] = tuple(vector.tolist())
        row.token_ids.append(0)
    return output
