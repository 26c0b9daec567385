"""A prefix is reused as far as a snapshot reaches, and slots come back whatever happens to who held them."""

from __future__ import annotations

import pytest

from antiphon.core.step import StateSnapshot
from antiphon.engine.block_manager import hash_blocks
from antiphon.engine.state_slots import Prefix, StateSlots

BLOCK = 4
TOKENS = list(range(40))
HASHES = hash_blocks(TOKENS, BLOCK)


def slots(num: int = 8, **more: bool) -> StateSlots:
    return StateSlots(num, BLOCK, snapshot_blocks=3, **more)


def test_snapshots_are_taken_every_so_many_blocks_and_at_the_end_of_what_is_known() -> None:
    pool = slots()
    sequence = pool.begin(Prefix(blocks=()), 31)  # 7 full blocks
    step = pool.plan(sequence, HASHES, 0, 31)
    assert [snapshot.end_token for snapshot in step.snapshots] == [12, 24, 28]
    assert step.read is None


def test_a_step_never_writes_what_it_reads_and_the_next_one_goes_on_from_what_was_written() -> None:
    pool = slots()
    sequence = pool.begin(Prefix(blocks=()), 3)
    seen = []
    for token in range(4):
        step = pool.plan(sequence, HASHES, token, 1)
        assert step.read != step.write
        seen.append((step.read, step.write))
        pool.computed(sequence, HASHES, token + 1)
    assert [read for read, _ in seen[1:]] == [write for _, write in seen[:-1]]
    assert len({write for _, write in seen}) == 2, "two slots a sequence, however long it gets"


def test_a_prefix_reaches_to_its_last_snapshot_and_is_read_where_it_lies() -> None:
    pool = slots()
    first = pool.begin(Prefix(blocks=()), 20)
    step = pool.plan(first, HASHES, 0, 20)
    assert pool.reach([7, 8, 9, 10, 11], HASHES) == Prefix(blocks=()), "not before the step is over"
    pool.computed(first, HASHES, 20)
    pool.end(first)
    assert pool.reach([7, 8, 9, 10], HASHES) == Prefix(blocks=(7, 8, 9), snapshot=step.snapshots[0].slot)
    assert pool.reach([7, 8], HASHES) == Prefix(blocks=())
    prefix = pool.reach([7, 8, 9, 10, 11], HASHES)
    second = pool.begin(prefix, 24)
    after = pool.plan(second, HASHES, 20, 4)
    assert after.read == prefix.snapshot == step.snapshots[1].slot
    assert after.snapshots == (StateSnapshot(end_token=24, slot=after.snapshots[0].slot),)
    pool.computed(second, HASHES, 24)
    pool.end(second)
    assert pool.num_free_slots == pool.num_slots
    assert pool.num_snapshots == 3


def test_a_step_that_gave_no_numbers_leaves_no_snapshot() -> None:
    pool = slots()
    sequence = pool.begin(Prefix(blocks=()), 12)
    assert pool.plan(sequence, HASHES, 0, 12).snapshots
    pool.end(sequence)
    assert pool.num_snapshots == 0
    assert pool.num_free_slots == pool.num_slots


def test_snapshots_make_room_for_sequences_and_sequences_wait_for_slots() -> None:
    pool = slots(4)
    first = pool.begin(Prefix(blocks=()), 24)
    pool.plan(first, HASHES, 0, 24)  # two snapshots: all four slots
    assert not pool.fits(Prefix(blocks=()))
    pool.computed(first, HASHES, 24)
    assert pool.num_snapshots == 2
    assert pool.fits(Prefix(blocks=()))
    prefix = pool.reach(list(range(6)), HASHES)
    assert not pool.fits(prefix), "the snapshot that is read and two slots are more than are free"
    pool.begin(Prefix(blocks=()), 3)
    assert pool.num_snapshots == 0


def test_a_sequence_without_room_for_a_snapshot_is_computed_without_one() -> None:
    pool = slots(2)
    sequence = pool.begin(Prefix(blocks=()), 24)
    assert pool.plan(sequence, HASHES, 0, 24).snapshots == ()


def test_a_state_that_arrives_is_read_from_where_it_was_awaited() -> None:
    pool = slots()
    sequence = pool.begin(Prefix(blocks=()), 20)
    pool.arrived(sequence)
    step = pool.plan(sequence, HASHES, 20, 1)
    assert step.read == sequence.arrival
    assert step.write != sequence.arrival


@pytest.mark.parametrize("caching", [True, False])
def test_without_prefix_caching_nothing_is_kept(caching: bool) -> None:
    pool = slots(prefix_caching=caching)
    sequence = pool.begin(Prefix(blocks=()), 24)
    pool.plan(sequence, HASHES, 0, 24)
    pool.computed(sequence, HASHES, 24)
    assert (pool.num_snapshots > 0) == caching


@pytest.mark.parametrize("num_right", [0, 1, 2, 3])
def test_a_snapshot_behind_guesses_is_found_if_they_were_right_and_its_slot_is_free_if_not(num_right: int) -> None:
    pool = slots()
    sequence = pool.begin(Prefix(blocks=()), 10)
    pool.plan(sequence, HASHES[:2], 0, 10)
    pool.computed(sequence, HASHES[:2], 10)
    step = pool.plan(sequence, HASHES[:2], 10, 4)  # the token known last, and three guesses: the first fills the block
    assert [snapshot.end_token for snapshot in step.snapshots] == [12]
    for num_tokens in range(11, 12 + num_right):
        pool.computed(sequence, HASHES[: num_tokens // BLOCK], num_tokens)
    pool.settle(sequence)
    assert (pool.reach([7, 8, 9], HASHES).snapshot == step.snapshots[0].slot) == (num_right > 0)
    assert pool.plan(sequence, HASHES[:2], 11 + num_right, 1).read == step.write
    pool.end(sequence)
    assert pool.num_free_slots == pool.num_slots
