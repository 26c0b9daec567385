"""When the router departs from the plain router's pick and from the general expert: only where rehearsals show that it pays."""

import numpy as np

from antiphon.coe.training.gating import NEVER, Departure, Rehearsal, choose_departure, scale_of

ABSENT = np.full(2000, -10.0)


def _rehearsal(familiar: float, *, plain: float, general: float, other: float, lead: float, seed: int) -> Rehearsal:
    """2,000 prompts: what three experts score on average there, and how far ahead of both the third is expected."""
    source = np.random.default_rng(seed)
    pick_B, general_B, other_B = ((source.random(2000) < chance).astype(float) for chance in (plain, general, other))
    expected_4B = np.stack([ABSENT, np.full(2000, 0.60), np.full(2000, 0.58), np.full(2000, 0.60 + lead)])
    return Rehearsal(
        signal_B=source.normal(familiar, 1.0, 2000).astype(np.float32),
        expected_4B=expected_4B,
        score_4B=np.stack([np.zeros(2000), pick_B, general_B, other_B]),
        plain_B=pick_B,
        general_B=general_B,
    )


def _chosen(known: list[Rehearsal], foreign: list[Rehearsal]) -> Departure:
    return choose_departure(scale_of([one.signal_B for one in known], [one.signal_B for one in foreign]), known, foreign)


def _to_general(one: Departure, rehearsal: Rehearsal) -> float:
    """Share of prompts that the gate or caution gives to the general expert instead of the plain router's pick."""
    familiarity_B = one.gate.familiarity(rehearsal.signal_B)
    hold_B = np.where(one.gate.strangeness(familiarity_B) > 0, one.strange_hold, one.hold)
    return float(((familiarity_B < one.gate.threshold) | (one.gate.lead(familiarity_B) > 0.02 + hold_B)).mean())


def test_a_lead_that_is_noise_moves_no_familiar_prompt() -> None:
    for seed in range(5):
        known = [_rehearsal(4.0, plain=0.6, general=0.5, other=0.6, lead=0.03, seed=seed)]
        assert _chosen(known, []).hold == NEVER


def test_a_lead_that_pays_beyond_doubt_is_taken() -> None:
    known = [_rehearsal(4.0, plain=0.5, general=0.4, other=0.7, lead=0.1, seed=1)]
    assert _chosen(known, []).hold < 0.1


def test_foreign_prompts_go_to_the_general_expert_where_the_plain_router_harms_them() -> None:
    known = [_rehearsal(8.0, plain=0.6, general=0.5, other=0.5, lead=0.0, seed=1)]
    foreign = [_rehearsal(0.0, plain=0.4, general=0.6, other=0.5, lead=0.0, seed=2 + i) for i in range(4)]
    found = _chosen(known, foreign)
    assert min(_to_general(found, one) for one in foreign) > 0.9
    assert _to_general(found, known[0]) < 0.2


def test_foreign_prompts_go_to_the_plain_routers_pick_where_that_gains() -> None:
    known = [_rehearsal(4.0, plain=0.6, general=0.5, other=0.5, lead=0.0, seed=1)]
    foreign = [_rehearsal(2.5, plain=0.6, general=0.5, other=0.4, lead=0.04, seed=2 + i) for i in range(4)]
    found = _chosen(known, foreign)
    assert max(_to_general(found, one) for one in foreign) < 0.2
    assert found.strange_hold >= 0.05


def test_known_prompts_lose_no_more_than_they_may_for_foreign_ones() -> None:
    """Prompts that look alike: what foreign ones would gain, known ones would lose."""
    known = [_rehearsal(2.0, plain=0.7, general=0.5, other=0.5, lead=0.0, seed=1)]
    foreign = [_rehearsal(2.0, plain=0.4, general=0.6, other=0.5, lead=0.0, seed=2 + i) for i in range(4)]
    assert _to_general(_chosen(known, foreign), known[0]) < 0.02


def test_how_careful_the_router_is_does_not_hang_on_which_datasets_were_there_to_be_left_out() -> None:
    """Foreign datasets that lose little, much, or nothing for sure: a table's few are no reason to be bolder with the next."""
    known = [_rehearsal(8.0, plain=0.6, general=0.6, other=0.5, lead=0.0, seed=1)]
    scale = scale_of([known[0].signal_B], [known[0].signal_B - 8])
    lost = [_foreign_that(0.0, *gains) for gains in ((-0.02, 0.02, -0.03), (-0.3, -0.2, 0.1), (-0.5, 0.01, 0.01))]
    first, *rest = (choose_departure(scale, known, foreign) for foreign in lost)
    assert rest == [first] * 2
    assert first.gate.caution > 0


def test_few_known_prompts_that_may_lose_are_routed_as_the_plain_router_would() -> None:
    """What the general expert costs them is in doubt by more than they may lose: it is not tried on them."""
    one = _rehearsal(2.0, plain=0.6, general=0.5, other=0.5, lead=0.0, seed=1)
    known = [
        Rehearsal(
            signal_B=one.signal_B[:100],
            expected_4B=one.expected_4B[:, :100],
            score_4B=one.score_4B[:, :100],
            plain_B=one.plain_B[:100],
            general_B=one.general_B[:100],
        )
    ]
    foreign = [_rehearsal(0.0, plain=0.4, general=0.6, other=0.5, lead=0.0, seed=2 + i) for i in range(4)]
    assert _to_general(_chosen(known, foreign), known[0]) < 0.02


def _foreign_that(familiar: float, *gains: float) -> list[Rehearsal]:
    """One dataset per gain of the plain router's pick over the general expert."""
    return [_rehearsal(familiar, plain=0.4 + gain, general=0.4, other=0.3, lead=0.0, seed=40 + i) for i, gain in enumerate(gains)]


def test_where_every_kind_of_foreign_prompt_gains_they_are_routed_as_known_ones_are() -> None:
    known = [_rehearsal(2.0, plain=0.7, general=0.4, other=0.3, lead=0.0, seed=1)]
    foreign = _foreign_that(2.0, 0.26, 0.3, 0.34, 0.3, 0.28)
    found = _chosen(known, foreign)
    assert found.gate.caution == 0.0
    assert max(_to_general(found, one) for one in (*known, *foreign)) < 0.02


def test_a_mean_gain_over_foreign_datasets_does_not_hide_the_one_that_loses() -> None:
    """Seven gain by a few points and one loses as many: surely a gain on average, and no promise for the next dataset."""
    known = [_rehearsal(8.0, plain=0.6, general=0.6, other=0.3, lead=0.0, seed=1)]
    foreign = _foreign_that(0.0, 0.08, 0.1, 0.09, 0.11, 0.08, 0.1, 0.09, -0.08)
    assert _to_general(_chosen(known, foreign), foreign[-1]) > 0.9
