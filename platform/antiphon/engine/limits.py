"""An engine's limits and counters (pure values), and what it takes of a request (request speed).

Must not know: who enforces them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from antiphon.core.errors import InvalidInput
from antiphon.core.request import MAX_LOGPROBS, Request, SamplingParams

# Of texts that come with a request; the public doors allow less.
_MAX_ID_CHARS = 512
_MAX_TEXT_CHARS = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerConfig:
    """Limits of one engine; the document's scheduler and cache sections, resolved."""

    max_num_seqs: int
    max_num_batched_tokens: int
    max_queued_requests: int
    max_model_len: int
    block_size_tokens: int
    num_blocks: int
    prefix_caching: bool = True
    remote_prefill_min_tokens: int = 64
    kv_lease_s: float = 30.0
    num_state_slots: int | None = None  # None = the model has no states
    snapshot_blocks: int = 16  # a state is kept for equal prefixes every so many blocks, and at a prompt's end
    vocab_size: int | None = None  # token ids below it are known; None = the executor takes any


@dataclass(slots=True, kw_only=True)
class SchedulerStats:
    """Counters since start; read by metrics and leases."""

    num_prompt_tokens: int = 0
    num_generation_tokens: int = 0
    num_preemptions: int = 0
    num_prefix_query_tokens: int = 0
    num_prefix_hit_tokens: int = 0
    num_kv_transfers: int = 0
    num_kv_failures: int = 0


def check_request(request: Request, config: SchedulerConfig) -> None:
    """Refuse what this engine can't compute; a pure function, to be called before the request reaches the loop.

    The public doors check what users send with fields' names of their own. This is what the engine relies on, whoever asks.

    Raises:
        InvalidInput: the message names the field.
    """
    if not 0 < len(request.request_id) <= _MAX_ID_CHARS:
        raise InvalidInput(f"a request id of {len(request.request_id)} characters", "request_id")
    for name, text in (("cache_salt", request.cache_salt), ("tenant", request.tenant), ("traceparent", request.traceparent or "")):
        if len(text) > _MAX_TEXT_CHARS:
            raise InvalidInput(f"{len(text)} characters, at most {_MAX_TEXT_CHARS} are taken", name)
    if len(request.prefill_worker or "") > _MAX_ID_CHARS:
        raise InvalidInput(f"a worker id of {len(request.prefill_worker or '')} characters", "prefill_worker")
    if request.deadline_s is not None and not math.isfinite(request.deadline_s):
        raise InvalidInput(f"{request.deadline_s} is no deadline", "deadline")
    num_tokens = len(request.prompt_token_ids) + len(request.output_token_ids)
    if num_tokens == 0:
        raise InvalidInput("the prompt has no tokens", "prompt")
    if num_tokens > config.max_model_len:
        raise InvalidInput(f"{num_tokens} tokens leave no room in the model's {config.max_model_len}", "prompt")
    _check_ids(request.prompt_token_ids, "prompt_token_ids", config.vocab_size)
    _check_ids(request.output_token_ids, "output_token_ids", config.vocab_size)
    _check_sampling(request.sampling)
    if request.sampling.pooling is not None:
        _check_ids(request.sampling.pooling.token_ids, "pooling.token_ids", config.vocab_size)


def check_cache(config: SchedulerConfig) -> None:
    """Refuse a cache that can't hold one sequence of the longest length. Raises InvalidInput."""
    if config.num_blocks * config.block_size_tokens < config.max_model_len:
        raise InvalidInput(
            f"the KV cache holds {config.num_blocks * config.block_size_tokens} tokens, one sequence of maxModelLen "
            f"needs {config.max_model_len}",
            "spec.cache",
        )


def check_room(request: Request, config: SchedulerConfig, *, is_prompt_only: bool) -> None:
    """Refuse a request that has no tokens, or no room for one more where it is to make any. Raises InvalidInput."""
    num_tokens = len(request.prompt_token_ids) + len(request.output_token_ids)
    if num_tokens == 0:
        raise InvalidInput("the prompt has no tokens", "prompt")
    if num_tokens > config.max_model_len - (0 if is_prompt_only else 1):
        raise InvalidInput(f"{num_tokens} tokens leave no room in the model's {config.max_model_len}", "prompt")


def _check_ids(ids: Sequence[int], name: str, vocab_size: int | None) -> None:
    if ids and (min(ids) < 0 or (vocab_size is not None and max(ids) >= vocab_size)):
        wrong = next(i for i in ids if i < 0 or (vocab_size is not None and i >= vocab_size))
        raise InvalidInput(f"token id {wrong} is not in the model's vocabulary of {vocab_size}", name)


def _check_sampling(sampling: SamplingParams) -> None:
    if sampling.max_tokens < 1:
        raise InvalidInput(f"{sampling.max_tokens} tokens are asked for", "max_tokens")
    ranges = (
        ("temperature", sampling.temperature, 0.0, math.inf),
        ("top_p", sampling.top_p, 0.0, 1.0),
        ("min_p", sampling.min_p, 0.0, 1.0),
        ("presence_penalty", sampling.presence_penalty, -math.inf, math.inf),
        ("frequency_penalty", sampling.frequency_penalty, -math.inf, math.inf),
        ("repetition_penalty", sampling.repetition_penalty, 0.0, math.inf),
    )
    for name, value, low, high in ranges:
        if not (math.isfinite(value) and low <= value <= high):
            raise InvalidInput(f"{value} is out of range", name)
    if sampling.repetition_penalty == 0.0:
        raise InvalidInput("0 is out of range", "repetition_penalty")
    if sampling.num_logprobs is not None and not 0 <= sampling.num_logprobs <= MAX_LOGPROBS:
        raise InvalidInput(
            f"{sampling.num_logprobs} log-probabilities are asked for, at most {MAX_LOGPROBS} are given", "num_logprobs"
        )
    pooling = sampling.pooling
    if pooling is not None and (sampling.max_tokens != 1 or sampling.rules is not None or sampling.num_logprobs is not None):
        raise InvalidInput("a vector is asked for, and tokens as well", "pooling")
    if not all(map(math.isfinite, sampling.logit_bias.values())):
        raise InvalidInput("a bias is not finite", "logit_bias")
