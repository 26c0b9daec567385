"""Look-up drafts what followed the last tokens before, and goes on with a copy for as long as it holds."""

from __future__ import annotations

import random

from antiphon.core.request import RequestId
from antiphon.engine.speculation.drafter import DraftAsked, Proposal
from antiphon.engine.speculation.ngram import LONG, NgramDrafter

A = RequestId("a")


def propose(drafter: NgramDrafter, tokens: list[int], num_drafts: int = 4) -> Proposal | None:
    return drafter.propose({A: DraftAsked(token_ids=tokens, num_drafts=num_drafts)}).get(A)


def drafts(tokens: list[int], num_drafts: int = 4) -> tuple[int, ...]:
    found = propose(NgramDrafter(), tokens, num_drafts)
    return () if found is None else found.token_ids


def test_what_followed_the_last_two_tokens_is_drafted_and_the_newest_place_counts() -> None:
    assert drafts([1, 2, 3, 4, 5, 9, 1, 2]) == (3, 4, 5, 9)
    assert drafts([1, 2, 7, 7, 1, 2, 8, 8, 5, 1, 2], 2) == (8, 8)


def test_four_equal_tokens_count_for_more_than_a_newer_two() -> None:
    assert drafts([1, 2, 3, 4, 50, 9, 3, 4, 60, 1, 2, 3, 4], 1) == (50,)


def test_new_tokens_get_no_draft() -> None:
    for tokens in ([], [1], [1, 2], [1, 2, 3, 4, 5], [5, 1, 6, 1, 7, 2]):
        assert drafts(tokens) == ()


def test_two_equal_tokens_count_for_more_than_a_newer_one_and_one_is_the_least_sure() -> None:
    assert drafts([1, 2, 50, 9, 2, 60, 1, 2], 1) == (50,)
    found = propose(NgramDrafter(), [1, 2, 50, 9, 3, 2], 2)
    assert found == Proposal(token_ids=(50, 9), confidences=(0, 3))


def test_a_form_goes_on_after_a_value_that_it_did_not_have_before() -> None:
    name, mark, town, end = [11, 12, 13], 20, [21, 22, 23], 30
    tokens = [*name, 101, 102, mark, *town, 103, end, *name, 104, 105]
    assert drafts(tokens) == ()
    assert drafts([*tokens, mark], 3) == tuple(town)


def test_a_copy_that_reaches_its_end_goes_round() -> None:
    assert drafts([7, 7, 7], 5) == (7, 7, 7, 7, 7)
    assert drafts([9, 1, 2, 3, 1, 2, 3, 1, 2], 7) == (3, 1, 2, 3, 1, 2, 3)


def test_a_copy_goes_on_where_it_is_and_gets_surer() -> None:
    text = list(range(10, 60))
    tokens = [*text, 1, 2, *text[20:40], 3, 4, *text[:2]]  # the tokens from 30 on stand twice
    drafter = NgramDrafter()
    confidences = []
    for token in text[2:]:
        found = propose(drafter, tokens, 3)
        assert found is not None
        assert found.token_ids[0] == token
        confidences.append(found.confidences[0] // 3)  # the length of the match
        tokens.append(token)
    assert confidences == sorted(confidences)
    assert confidences[0] == 1
    assert confidences[-1] == len(drafter.priors) // 3 - 1


def test_what_followed_alike_before_is_surer_and_what_changed_is_less_sure() -> None:
    label, value = [11, 12, 13], [20]
    form = [*label, 101, *value, *label, 102, *value, *label, 103, *value, *label[:2]]
    found = propose(NgramDrafter(), form, 3)
    assert found is not None
    assert found.token_ids == (13, 103, 20)
    priors = [NgramDrafter.priors[each] for each in found.confidences]
    assert priors[0] > 2 * priors[1], "the label was the same each time, its value was not"


def test_an_index_that_grows_with_the_answer_is_the_one_of_the_whole() -> None:
    chance = random.Random(3)
    for _ in range(60):
        tokens = [chance.randrange(4) for _ in range(chance.randint(1, 30))]
        grown = NgramDrafter()
        for _ in range(30):
            propose(grown, tokens)
            tokens += [chance.randrange(4) for _ in range(chance.randint(1, 5))]
        whole = NgramDrafter()
        for drafter in (grown, whole):
            propose(drafter, tokens)
        assert grown._indices[A].places == whole._indices[A].places
        assert grown._indices[A].followed == whole._indices[A].followed


def test_a_long_prompt_is_taken_in_over_several_steps_and_only_its_newest_part_at_all() -> None:
    tokens = list(range(100_000))
    drafter = NgramDrafter()
    sizes = []
    for _ in range(12):
        propose(drafter, tokens)
        sizes.append(len(drafter._indices[A].places[LONG]))
    assert sizes[0] < 5000
    assert sizes[-1] == sizes[-2] < 40_000
    tokens += tokens[-200:-190]
    assert propose(drafter, tokens, 3) == Proposal(token_ids=(99_810, 99_811, 99_812), confidences=(9, 9, 9))


def test_nothing_is_kept_of_a_request_that_ended() -> None:
    drafter = NgramDrafter()
    propose(drafter, [1, 2, 3, 1, 2])
    drafter.forget(A)
    drafter.forget(A)
    assert not drafter._indices
