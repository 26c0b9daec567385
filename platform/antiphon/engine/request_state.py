"""The mutable record of one request inside its engine (step speed); only the scheduler touches it."""

from __future__ import annotations

from antiphon.core.kv import KVTarget
from antiphon.core.request import Request, RequestId, RequestStatus, RequestTimes
from antiphon.engine.block_manager import BlockHash, hash_blocks
from antiphon.engine.state_slots import SequenceState


class RequestState:
    """Tokens, blocks and progress of one request; statuses are drawn in core.request."""

    __slots__ = (
        "block_hashes",
        "block_ids",
        "first_token_s",
        "known_to_runner",
        "kv_target",
        "num_cached_blocks",
        "num_cached_tokens",
        "num_computed_tokens",
        "num_preemptions",
        "num_remote_tokens",
        "num_sent_block_ids",
        "prefill_worker",
        "request",
        "scheduled_s",
        "sequence",
        "status",
        "token_ids",
    )

    def __init__(self, request: Request, kv_target: KVTarget | None = None) -> None:
        self.request = request
        self.kv_target = kv_target
        self.status = RequestStatus.WAITING
        self.token_ids = [*request.prompt_token_ids, *request.output_token_ids]
        self.num_computed_tokens = 0
        self.block_ids: list[int] = []
        self.num_sent_block_ids = 0  # of block_ids, how many the runner has been told
        self.known_to_runner = False
        self.block_hashes: list[BlockHash] = []
        self.num_cached_blocks = 0  # leading blocks already registered in the prefix cache
        self.prefill_worker = request.prefill_worker
        self.num_cached_tokens = 0
        self.num_remote_tokens = 0
        self.num_preemptions = 0
        self.sequence: SequenceState | None = None  # its state slots, while it holds blocks of a model that has states
        self.scheduled_s: float | None = None
        self.first_token_s: float | None = None

    @property
    def request_id(self) -> RequestId:
        """The request's id."""
        return self.request.request_id

    @property
    def num_prompt_tokens(self) -> int:
        """Length of the prompt."""
        return len(self.request.prompt_token_ids)

    @property
    def num_output_tokens(self) -> int:
        """Tokens generated, those of an earlier worker included."""
        return len(self.token_ids) - len(self.request.prompt_token_ids)

    @property
    def num_tokens_to_compute(self) -> int:
        """Known tokens whose KV is not computed yet. A hand-off leaves the last prompt token to the asker."""
        if self.kv_target is not None:
            return self.kv_target.first_token + self.kv_target.num_tokens - self.num_computed_tokens
        return len(self.token_ids) - self.num_computed_tokens

    def is_worth_remote(self, num_cached_tokens: int, min_tokens: int) -> bool:
        """Whether its KV should be asked of its prefill worker: at least ``min_tokens`` of it are not in the cache here."""
        return (
            self.prefill_worker is not None
            and self.kv_target is None
            and self.request.sampling.num_prompt_logprobs is None
            and len(self.token_ids) - 1 - num_cached_tokens >= min_tokens
        )

    def note_scheduled(self, now_s: float) -> None:
        """It is served; the first time counts."""
        if self.scheduled_s is None:
            self.scheduled_s = now_s

    def update_hashes(self, block_size_tokens: int) -> None:
        """Extend ``block_hashes`` to all full blocks of the known tokens."""
        done = len(self.block_hashes)
        if (done + 1) * block_size_tokens <= len(self.token_ids):
            parent = self.block_hashes[-1] if done else None
            tail = self.token_ids[done * block_size_tokens :]
            self.block_hashes += hash_blocks(tail, block_size_tokens, salt=self.request.cache_salt, parent=parent)

    def times(self, now_s: float) -> RequestTimes:
        """When things happened, closed at ``now_s``."""
        return RequestTimes(
            arrival_s=self.request.arrival_s,
            scheduled_s=self.scheduled_s,
            first_token_s=self.first_token_s,
            finished_s=now_s,
        )
