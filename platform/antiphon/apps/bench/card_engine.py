"""Requests decoded together by a whole engine on a card: blocks counted there, recorded steps, ahead or in turn (control speed).

Must not know: what the times are compared with.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from antiphon.apps.process.wiring.build import build_attention
from antiphon.apps.process.wiring.cache_room import CacheRoom
from antiphon.apps.process.wiring.resolve import ModelFacts, with_cache
from antiphon.core.document.spec import LLMDeploymentSpec
from antiphon.core.ids import Epoch, Role, WorkerId
from antiphon.core.request import Request, RequestId, RequestOutput, SamplingParams
from antiphon.device.memory import CardMemory
from antiphon.models.cache_layout import kv_layout
from antiphon.models.families import describe

_BLOCK = 16
_WARM_UP = 4  # decode steps before the clock starts


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoded:
    """What came of it. ``step_s``: mean seconds of a decode step of all requests."""

    tokens: dict[str, list[int]]
    step_s: float
    num_blocks: int
    cache_bytes: int
    num_ahead: int


def decoded(
    checkpoint: Any, device: torch.device, memory: CardMemory | None, batch: int, context: int, num_tokens: int, *, overlaps: bool
) -> Decoded:
    """``num_tokens`` more for ``batch`` requests of ``context`` tokens each, half of them greedy. ``memory``: None = as many blocks
    as they need.
    """
    try:
        return _decoded(checkpoint, device, memory, batch, context, num_tokens, overlaps=overlaps)
    finally:
        gc.collect()  # an engine's parts know each other; the next one wants the card's memory


def _decoded(
    checkpoint: Any, device: torch.device, memory: CardMemory | None, batch: int, context: int, num_tokens: int, *, overlaps: bool
) -> Decoded:
    longest = context + num_tokens + _WARM_UP + _BLOCK
    spec = LLMDeploymentSpec.model_validate(
        {
            "model": {"uri": "random", "dtype": "bfloat16", "maxModelLen": longest},
            "pools": [{"name": "monolith", "role": "monolith"}],
            "scheduler": {
                "maxNumSeqs": batch,
                "maxNumBatchedTokens": max(16, min(8192, batch * context)),
                "maxQueuedRequests": batch,
            },
            "cache": {"blockSizeTokens": _BLOCK, "prefixCaching": False},
        }
    )
    config = describe(checkpoint.config)
    facts = ModelFacts(
        checkpoint=checkpoint,
        config=config,
        dtype=torch.bfloat16,
        activation_dtype=torch.bfloat16,
        return_dtype=torch.bfloat16,
        device=device,
        max_model_len=longest,
        kv=kv_layout(config, torch.bfloat16, _BLOCK),
        num_blocks=None,
        num_state_slots=None,
        fingerprint="random",
        revision="random",
        card_memory=memory,
    )
    if memory is None:
        facts = with_cache(facts, spec, CacheRoom(num_blocks=batch * -(-longest // _BLOCK), num_state_slots=None))
    tokens: dict[str, list[int]] = {}

    def take(outputs: Sequence[RequestOutput]) -> None:
        for output in outputs:
            assert output.error is None, output.error
            tokens.setdefault(output.request_id, []).extend(output.new_token_ids)

    part = build_attention(facts, spec, Role.MONOLITH, WorkerId("bench"), Epoch(1), take, time.monotonic, overlaps=overlaps)
    try:
        for number in range(batch):
            part.engine.submit(
                Request(
                    request_id=RequestId(f"{number}"),
                    prompt_token_ids=tuple((number + 7 * place) % config.vocab_size for place in range(context)),
                    sampling=SamplingParams(
                        max_tokens=_WARM_UP + num_tokens, temperature=float(number % 2), seed=number, ignore_eos=True
                    ),
                )
            )
        while len(tokens) < batch or min(map(len, tokens.values())) < _WARM_UP:
            part.engine.step()
        count, start_s = sum(map(len, tokens.values())), time.perf_counter()
        while part.engine.scheduler.has_requests:
            part.engine.step()
        seconds = time.perf_counter() - start_s
        count = sum(map(len, tokens.values())) - count
        num_blocks, overlap = part.engine.scheduler.blocks.num_blocks, part.worker.overlap
        return Decoded(
            tokens=tokens,
            step_s=seconds / max(1, count) * batch,
            num_blocks=num_blocks,
            cache_bytes=num_blocks * facts.kv.block_bytes,
            num_ahead=0 if overlap is None else overlap.num_ahead,
        )
    finally:
        part.close()
