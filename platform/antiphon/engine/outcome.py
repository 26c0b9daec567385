"""What a token or an end means for a request: whether it stops, and what its caller is told (step speed, pure).

Must not know: queues, blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from antiphon.core.errors import ErrorInfo
from antiphon.core.request import FINISH_REASON, RequestOutput, RequestStatus, TokenLogprob
from antiphon.engine.request_state import RequestState


def stop_status(state: RequestState, token_id: int, max_model_len: int) -> RequestStatus | None:
    """The status that ``token_id``, appended last, ends the request with; None = it goes on."""
    sampling = state.request.sampling
    if state.num_output_tokens > sampling.min_tokens:
        is_eos = token_id in state.request.eos_token_ids and not sampling.ignore_eos
        if is_eos or token_id in sampling.stop_token_ids:
            return RequestStatus.FINISHED_STOPPED
    if state.num_output_tokens >= sampling.max_tokens or len(state.token_ids) >= max_model_len:
        return RequestStatus.FINISHED_LENGTH
    return None


def take_tokens(
    state: RequestState, token_ids: Sequence[int], max_model_len: int, computed: Callable[[RequestState], None]
) -> tuple[int, RequestStatus | None]:
    """Append what a step drew: the next token, and those after drafts that were taken, up to the one that ends the request; how
    many were, and the status that the last brought. ``computed``: a further token's KV is there.
    """
    for num_taken, token_id in enumerate(token_ids, 1):
        if num_taken > 1:  # the token before was a draft
            state.num_computed_tokens += 1
            computed(state)
        state.token_ids.append(token_id)
        status = stop_status(state, token_id, max_model_len)
        if status is not None:
            return num_taken, status
    return len(token_ids), None


def token_output(
    state: RequestState,
    token_ids: Sequence[int],
    logprobs: Sequence[TokenLogprob],
    status: RequestStatus | None,
    now_s: float,
    vector: tuple[float, ...] = (),
) -> RequestOutput:
    """What a step added, one token or more, and the end when ``status``, which the last of them brought, is one; or the ``vector``
    that was asked for instead.
    """
    return RequestOutput(
        request_id=state.request_id,
        new_token_ids=() if vector else tuple(token_ids),
        vector=vector,
        logprobs=tuple(logprobs),
        finish_reason=None if status is None else FINISH_REASON[status],
        stop_token_id=token_ids[-1] if status is RequestStatus.FINISHED_STOPPED else None,
        num_cached_tokens=state.num_cached_tokens,
        num_remote_tokens=state.num_remote_tokens,
        num_preemptions=state.num_preemptions,
        times=None if status is None else state.times(now_s),
        traceparent=None if status is None else state.request.traceparent,
    )


def end_output(state: RequestState, status: RequestStatus, error: ErrorInfo | None, now_s: float) -> RequestOutput:
    """An end outside the normal course: abort, deadline, error, hand-over."""
    return RequestOutput(
        request_id=state.request_id,
        finish_reason=FINISH_REASON[status],
        error=error,
        num_cached_tokens=state.num_cached_tokens,
        num_remote_tokens=state.num_remote_tokens,
        num_preemptions=state.num_preemptions,
        times=state.times(now_s),
        traceparent=state.request.traceparent,
    )
