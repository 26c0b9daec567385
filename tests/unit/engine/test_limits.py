"""What an engine refuses before it reaches the loop, with the field's name."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from antiphon.core.errors import InvalidInput
from antiphon.core.kv import KVTarget, TransferId
from antiphon.core.request import Request, RequestId, SamplingParams
from antiphon.core.step import ModelRunnerOutput
from antiphon.engine.limits import SchedulerConfig, check_request
from antiphon.engine.scheduler import Scheduler

CONFIG = SchedulerConfig(
    max_num_seqs=4,
    max_num_batched_tokens=64,
    max_queued_requests=8,
    max_model_len=48,
    block_size_tokens=4,
    num_blocks=24,
    vocab_size=100,
)
GOOD = Request(request_id=RequestId("r"), prompt_token_ids=(1, 99), sampling=SamplingParams(max_tokens=3))


def test_what_the_model_can_compute_is_taken() -> None:
    check_request(GOOD, CONFIG)  # raises InvalidInput for what it refuses
    check_request(replace(GOOD, output_token_ids=(0,), deadline_s=5.0, prefill_worker="d/prefill/0", cache_salt="tenant"), CONFIG)


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("prompt_token_ids", {"prompt_token_ids": (1, 100)}),
        ("prompt_token_ids", {"prompt_token_ids": (2**32 - 1,)}),
        ("prompt_token_ids", {"prompt_token_ids": (-1,)}),
        ("output_token_ids", {"output_token_ids": (100,)}),
        ("prompt", {"prompt_token_ids": ()}),
        ("prompt", {"prompt_token_ids": (1,) * 49}),
        ("request_id", {"request_id": ""}),
        ("request_id", {"request_id": "r" * 10_000}),
        ("cache_salt", {"cache_salt": "s" * 1_000_000}),
        ("traceparent", {"traceparent": "x" * 10_000}),
        ("prefill_worker", {"prefill_worker": "w" * 10_000}),
        ("deadline", {"deadline_s": math.inf}),
        ("deadline", {"deadline_s": math.nan}),
    ],
)
def test_a_request_beyond_the_engine_is_refused_by_name(field: str, change: dict[str, object]) -> None:
    with pytest.raises(InvalidInput) as refused:
        check_request(replace(GOOD, **change), CONFIG)  # type: ignore[arg-type]
    assert refused.value.field == field


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", 0),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("temperature", -1.0),
        ("top_p", math.nan),
        ("top_p", 1.5),
        ("min_p", -0.1),
        ("presence_penalty", math.inf),
        ("frequency_penalty", math.nan),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", -1.0),
        ("num_logprobs", 2**32 - 1),
        ("logit_bias", {1: math.inf}),
        ("logit_bias", {1: math.nan}),
    ],
)
def test_sampling_beyond_the_engine_is_refused_by_name(field: str, value: object) -> None:
    sampling = replace(GOOD.sampling, **{field: value})  # type: ignore[arg-type]
    with pytest.raises(InvalidInput) as refused:
        check_request(replace(GOOD, sampling=sampling), CONFIG)
    assert refused.value.field == field


def test_a_prompt_that_is_computed_for_another_worker_is_counted() -> None:
    scheduler = Scheduler(CONFIG, clock=lambda: 0.0)
    prompt = replace(GOOD, prompt_token_ids=(1,) * 20)
    scheduler.add(prompt, KVTarget(peer=0, transfer_id=TransferId(1), first_token=0, num_tokens=19))
    step = scheduler.schedule()
    scheduler.update(step, ModelRunnerOutput())
    assert scheduler.stats.num_prompt_tokens == 19
