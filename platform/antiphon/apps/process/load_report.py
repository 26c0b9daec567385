"""Tells how far a starting worker is with its weights, twice a second (control speed). Must not know: who listens."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import contextmanager

from antiphon.apps.process.config import WorkerConfig
from antiphon.apps.process.events import EventWriter
from antiphon.apps.process.wiring.resolve import ModelFacts
from antiphon.apps.process.wiring.sizes import ffn_parallelism
from antiphon.core.errors import AntiphonError
from antiphon.core.ids import Role
from antiphon.models.loading.inventory import ffn_shard_bytes, take_inventory
from antiphon.models.loading.progress import watched


@contextmanager
def load_reported(facts: ModelFacts, config: WorkerConfig, events: EventWriter) -> Iterator[None]:
    """Report what the checkpoint gave while the block runs."""
    checkpoint = facts.checkpoint
    before, total = checkpoint.bytes_read, bytes_to_read(facts, config)
    with watched(
        "weights",
        lambda: checkpoint.bytes_read - before,
        lambda: total,
        lambda amount: events.loading(amount.num_bytes, amount.total_bytes),
    ):
        yield


def bytes_to_read(facts: ModelFacts, config: WorkerConfig) -> int | None:
    """What a worker of this role reads of its checkpoint, nearly; None where its format is not a plain one."""
    itemsize = _itemsize(facts)
    if itemsize is None:
        return None
    if config.role is Role.FFN:
        with contextlib.suppress(AntiphonError):
            _, groups = ffn_parallelism(config.spec)
            return ffn_shard_bytes(facts.config, config.shard, facts.placement(groups), itemsize)
        return None
    try:
        inventory = take_inventory(facts.config, facts.checkpoint, "float32")
    except AntiphonError:
        return None
    return itemsize * (inventory.attention_parameters if config.role is Role.ATTENTION else inventory.parameters)


def _itemsize(facts: ModelFacts) -> int | None:
    """Of the weights as they are stored; None where matrices are stored with scales beside them."""
    names = facts.checkpoint.names
    embedding = next((name for name in names if name.startswith(facts.config.names.embed)), None)
    if embedding is None or any("scale" in name for name in names):
        return None
    return facts.checkpoint.dtype(embedding).itemsize
