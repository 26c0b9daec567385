"""How many KV blocks a card has room for beside its worker's weights and the largest step (control speed).

    budget = gpuMemoryUtilization x the card's memory
           = held (weights, links' slots, drafters) + what the largest step takes besides + recordings + KV blocks and states

Seen, not guessed: weights are on the card and the step is computed once before the blocks are counted. What does not fit is refused
by its field, with the figures; nothing is found out later by running out. Must not know: engines, links.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from antiphon.apps.process.wiring.cache_room import CacheRoom, cache_room
from antiphon.apps.process.wiring.resolve import ModelFacts, with_cache
from antiphon.core.document.pools import parse_quantity
from antiphon.core.document.spec import LLMDeploymentSpec
from antiphon.core.errors import InvalidInput
from antiphon.core.kv import KVLayout
from antiphon.device.memory import CardMemory, shown
from antiphon.worker.cards.profiling import LargestSteps

_GRAIN_BYTES = 2 << 20  # the allocator rounds each plane of the cache up to a multiple of this

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class CardUse:
    """Bytes of a worker's share of a card, before it has a cache."""

    budget: int
    weights: int  # and whatever else stays
    step: int  # more, while the largest step computes
    recordings: int

    @property
    def left(self) -> int:
        """For the cache; not above 0 where nothing fits."""
        return self.budget - self.weights - self.step - self.recordings

    def __str__(self) -> str:
        parts = f"weights {shown(self.weights)}, the largest step {shown(self.step)}"
        return parts + (f", recorded steps {shown(self.recordings)}" if self.recordings else "")


@contextmanager
def within_share(memory: CardMemory | None) -> Iterator[None]:
    """What the block puts on the card must fit into its worker's share.

    Raises:
        InvalidInput: it does not; names the field, with the figures.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        if memory is None:
            raise
        now = memory.look()
        raise InvalidInput(
            f"{memory.field}: weights and one step do not fit into {shown(memory.budget_bytes)} of the card, {memory.share:g} of "
            f"{shown(now.total)}: {shown(now.held)} were taken when there was no more; a larger share, a smaller "
            "scheduler.maxNumBatchedTokens or more workers to split the model over",
            memory.field,
        ) from error


def see_use(
    memory: CardMemory, make: Callable[[], LargestSteps], spec: LLMDeploymentSpec, recorded_rows: int, spare_bytes: int
) -> CardUse:
    """Compute the largest steps once and see what they take.

    Args:
        memory: of the card that weights are on already.
        make: the worker's halves, as steps.
        spec: its limits.
        recorded_rows: of the largest decode step that will be recorded, whose memory is kept; 0 = none is.
        spare_bytes: what recordings keep besides.

    Raises:
        InvalidInput: others hold some of the worker's share, or a step does not fit.
    """
    limits = spec.scheduler
    held = memory.settle().held
    memory.check_free()
    with within_share(memory):
        steps = make()
        steps.prompts(limits.max_num_batched_tokens, min(limits.max_num_seqs, limits.max_num_batched_tokens))
        peak = memory.look().peak
        recorded = 0
        if recorded_rows:
            before = memory.settle().held
            steps.decodes(recorded_rows)
            recorded = memory.look().peak - before + spare_bytes
    del steps
    memory.settle()
    return CardUse(budget=memory.budget_bytes, weights=held, step=peak - held, recordings=recorded)


def sized(facts: ModelFacts, spec: LLMDeploymentSpec, memory: CardMemory, use: CardUse) -> ModelFacts:
    """The facts with the cache that fits the card, or the smaller one that the document states.

    Raises:
        InvalidInput: nothing fits, or less than the document states, or not one sequence of its ``maxModelLen``; names the field.
    """
    layout = facts.kv
    left = use.left - _rounding_bytes(layout) - layout.block_bytes  # one block is spare
    room = f"of the {shown(use.budget)} that this worker may fill ({memory.field} {memory.share:g})"
    if left < layout.block_bytes:
        raise InvalidInput(
            f"{memory.field}: nothing {room} is left for KV blocks of {layout.block_bytes:,} bytes: {use}; a larger share, a "
            "smaller scheduler.maxNumBatchedTokens or more workers to split the model over",
            memory.field,
        )
    stated = spec.cache.memory
    if stated is not None and spec.cache.num_blocks is None and parse_quantity(stated) > left:
        raise InvalidInput(f"{stated} is more than the {shown(left)} left {room}: {use}", "spec.cache.memory")
    found = cache_room(spec, layout, facts.max_model_len, left if stated is None else int(parse_quantity(stated)))
    taken = found.num_blocks * layout.block_bytes + (found.num_state_slots or 0) * layout.state_bytes
    if taken > left:
        raise InvalidInput(
            f"{found.num_blocks} blocks take {shown(taken)}, more than the {shown(left)} left {room}: {use}", "spec.cache.numBlocks"
        )
    num_tokens = found.num_blocks * layout.block_size_tokens
    asked = spec.model.max_model_len
    if asked is not None and num_tokens < asked:
        raise InvalidInput(
            f"one sequence of {asked} tokens does not fit: {found.num_blocks} blocks hold {num_tokens}, {shown(left)} are left "
            f"{room}: {use}",
            "spec.model.maxModelLen",
        )
    logger.info("%d KV blocks, %s, beside %s", found.num_blocks, shown(taken), use)
    return with_cache(facts, spec, CacheRoom(num_blocks=found.num_blocks, num_state_slots=found.num_state_slots))


def _rounding_bytes(layout: KVLayout) -> int:
    """What the allocator may add: each plane of each layer is a tensor of its own."""
    return _GRAIN_BYTES * (len(layout.kv_layers) * len(layout.planes) + len(layout.state_layers) * len(layout.states))
