"""The embedded store is as large as its bounds, whatever a part or the users of many tenants put into it."""

from __future__ import annotations

import random

import pytest

from antiphon.core.budget import TenantLimits, Use, Wish
from antiphon.core.errors import InvalidInput, Unavailable
from antiphon.directory.budgets import MemoryBudgets
from antiphon.directory.memory import MemoryDirectory

LONG_S = 600.0


async def test_notes_of_many_topics_stay_below_one_bound_and_the_largest_topic_gives_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("antiphon.directory.memory.MAX_NOTES_BYTES", 40_000)
    directory = MemoryDirectory()
    await directory.put_note("quiet", "k", "x" * 500, LONG_S)
    for number in range(200):
        await directory.put_note(f"loud-{number % 20}", f"{number}", "𝄞" * 250, LONG_S)  # of four bytes each
    held = {f"loud-{number}": await directory.notes(f"loud-{number}") for number in range(20)}
    kept = [text for notes in held.values() for text in notes.values()]
    assert 30_000 < sum(len(text.encode()) for text in kept) <= 40_000
    assert set(kept) == {"𝄞" * 250}
    assert "199" in held["loud-19"], "the newest is kept"
    assert await directory.note("quiet", "k") == "x" * 500


async def test_what_notes_take_is_counted_right_however_they_come_and_go(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each bound holds after thousands of notes written, replaced, expired and displaced, and as many are kept as fit."""
    for name, bound in (("MAX_NOTES_BYTES", 20_000), ("MAX_TOPIC_BYTES", 4_000), ("MAX_NOTES", 30), ("MAX_TOPICS", 12)):
        monkeypatch.setattr(f"antiphon.directory.memory.{name}", bound)
    monkeypatch.setattr("antiphon.directory.memory._NOTES_SWEPT_AT", 8)
    draw, now_s = random.Random(11), 0.0
    directory = MemoryDirectory(clock=lambda: now_s)
    for _ in range(4_000):
        now_s += draw.random()
        topic, key = f"t{draw.randrange(12)}", f"k{draw.randrange(60)}"
        if draw.random() < 0.05:
            await directory.notes(topic)
        await directory.put_note(topic, key, "é" * draw.randrange(0, 400), draw.choice([1.0, 30.0, 900.0]))
        held = {topic: sum(note.num_bytes for note in notes.values()) for topic, notes in directory._notes.items()}
        assert directory._note_bytes == held
        assert directory._all_note_bytes == sum(held.values()) <= 20_000
        assert max(held.values()) <= 4_000
    assert sum(held.values()) > 15_000
    now_s += 1_000
    for number in range(12):
        assert not await directory.notes(f"t{number}")
    assert directory._all_note_bytes == 0


async def test_a_note_is_as_long_as_its_bytes() -> None:
    directory = MemoryDirectory()
    with pytest.raises(InvalidInput, match="bytes"):
        await directory.put_note("t", "k", "𝄞" * (1 << 17), LONG_S)


async def test_indices_of_all_pools_are_bounded_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("antiphon.directory.memory.MAX_CLAIMS", 50)
    directory = MemoryDirectory()
    for number in range(50):
        await directory.claim_index("d", f"pool-{number % 7}", f"owner-{number}", LONG_S)
    with pytest.raises(Unavailable, match="full"):
        await directory.claim_index("d", "pool-0", "another", LONG_S)
    assert await directory.claim_index("d", "pool-0", "owner-7", LONG_S) == 1  # who has one renews it
    await directory.release_index("d", "pool-0", "owner-7")
    assert await directory.claim_index("d", "pool-9", "another", LONG_S) == 0


async def test_reservations_of_all_tenants_are_bounded_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("antiphon.directory.budgets._MAX_OPEN", 20)
    budgets = MemoryBudgets()

    def wish(number: int) -> Wish:
        limits = TenantLimits(num_streams=100)
        return Wish(tenant=f"t{number % 3}", ticket=f"{number}", num_tokens=1, limits=limits, lease_s=30.0)

    for number in range(20):
        await budgets.take_budget(wish(number))
    with pytest.raises(Unavailable, match="full"):
        await budgets.take_budget(wish(20))
    await budgets.take_budget(wish(19))  # again, by who has it
    for number in range(10):
        await budgets.settle_budget(f"t{number % 3}", f"{number}", 0)
    for number in range(20, 30):
        await budgets.take_budget(wish(number))
    with pytest.raises(Unavailable, match="full"):
        await budgets.take_budget(wish(30))


async def test_a_ledger_of_too_many_rows_loses_its_oldest_days(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("antiphon.directory.budgets._MAX_LEDGER", 25)
    budgets = MemoryBudgets()
    for day in range(1, 6):
        uses = [
            Use(tenant=f"t{number}", model="m", num_requests=1, num_prompt_tokens=1, num_cached_tokens=0, num_output_tokens=1)
            for number in range(10)
        ]
        await budgets.add_use(f"2027-01-0{day}", f"b{day}", uses)
    assert [len(await budgets.used(f"2027-01-0{day}")) for day in range(1, 6)] == [0, 0, 0, 10, 10]
