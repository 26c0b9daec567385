import asyncio
import math
from collections.abc import Mapping
from typing import Any

import pytest

from antiphon.coe.serving.combining import Answer, AskFailed, Combined, Declined, chance_of, combine
from antiphon.core.document.coe.combining import CheckSpec, CombineSpec
from antiphon.core.errors import Unavailable

CHECKS = [{"expert": name, "weight": 2.0, "bias": 1.0} for name in ("small", "middle", "large")]
ALL = ("small", "middle", "large")


def spec(mode: str, **more: Any) -> CombineSpec:
    given: dict[str, Any] = {"mode": mode, "experts": list(ALL), **({"checks": CHECKS} if mode == "cascade" else {}), **more}
    return CombineSpec.model_validate(given)


async def run(
    document: CombineSpec, says: Mapping[str, tuple[str, float | None] | Exception], *, pass_on_last: bool = False
) -> tuple[Combined[str], list[str]]:
    order: list[str] = []

    async def ask(expert: str) -> Answer[str]:
        order.append(expert)
        said = says[expert]
        if isinstance(said, Exception):
            raise said
        text, logprob = said
        if text == "silent":
            await asyncio.Event().wait()
        return Answer(text=text, mean_logprob=logprob, num_prompt_tokens=10, num_completion_tokens=5, payload=expert)

    return await combine(document, ALL, ask, pass_on_last=pass_on_last), order


def outcomes(found: Combined[str]) -> list[str]:
    return [f"{one.expert} {one.outcome}" for one in found.asked]


def test_the_chance_is_the_logistic_function_of_the_mean_log_probability() -> None:
    check = CheckSpec(expert="small", weight=2.0, bias=1.0)
    answer = Answer(text="", mean_logprob=-0.75, num_prompt_tokens=0, num_completion_tokens=0, payload=None)
    assert chance_of(check, answer) == pytest.approx(1 / (1 + math.exp(0.5)))


async def test_a_cascade_stops_at_the_first_answer_that_its_check_accepts() -> None:
    found, order = await run(spec("cascade", accept=0.6), {"small": ("a", -1.5), "middle": ("b", -0.1), "large": ("c", 0.0)})
    assert (found.expert, order) == ("middle", ["small", "middle"])
    assert outcomes(found) == ["small rejected", "middle accepted"]
    assert [one.num_completion_tokens for one in found.asked] == [5, 5]


async def test_the_last_of_a_cascade_is_left_to_the_caller_only_where_nobody_checks_it() -> None:
    says = {"small": ("a", -9.0), "middle": AskFailed("down"), "large": ("c", -9.0)}
    found, order = await run(spec("cascade"), says, pass_on_last=True)
    assert (found.expert, found.answer, order) == ("large", None, ["small", "middle"])
    assert outcomes(found) == ["small rejected", "middle failed", "large unchecked"]
    with pytest.raises(Declined, match=r"small rejected 0\.00, middle failed down, large rejected"):
        await run(spec("cascade", otherwise="decline"), says, pass_on_last=True)


async def test_without_probabilities_nothing_is_accepted() -> None:
    found, _ = await run(spec("cascade"), {"small": ("a", None), "middle": ("b", None), "large": ("c", None)})
    assert (found.expert, outcomes(found)[0]) == ("large", "small rejected")


async def test_a_cascade_asks_nobody_more_once_the_tokens_are_used() -> None:
    found, order = await run(
        spec("cascade", max_tokens=30), {"small": ("a", -2.0), "middle": ("b", -1.0), "large": ("c", 0.0)}, pass_on_last=True
    )
    assert (found.expert, order) == ("middle", ["small", "middle"])  # the better of what was rejected
    assert outcomes(found)[-1] == "large stopped"


async def test_when_the_last_fails_what_was_rejected_stands_and_with_nothing_nobody_answered() -> None:
    found, _ = await run(spec("cascade"), {"small": ("a", -2.0), "middle": AskFailed("busy"), "large": AskFailed("down")})
    assert found.expert == "small"
    with pytest.raises(Unavailable, match="large failed down"):
        await run(spec("cascade"), dict.fromkeys(ALL, AskFailed("down")))


async def test_an_expert_that_does_not_finish_in_time_has_failed() -> None:
    found, _ = await run(
        spec("cascade", step_timeout_s=0.01), {"small": ("silent", None), "middle": ("b", 0.0), "large": ("c", 0.0)}
    )
    assert found.expert == "middle"
    assert str(found.asked[0]) == "small failed not finished in time"


async def test_most_votes_win_and_ties_go_to_the_earlier() -> None:
    found, _ = await run(spec("vote"), {"small": ("No.", None), "middle": (" yes ", None), "large": ("Yes!", None)})
    assert (found.expert, outcomes(found)) == ("middle", ["small outvoted", "middle agreed", "large agreed"])
    alone, _ = await run(spec("vote"), {"small": ("a", None), "middle": ("b", None), "large": ("c", None)})
    assert alone.expert == "small"
    with pytest.raises(Declined):
        await run(spec("vote", otherwise="decline"), {"small": ("a", None), "middle": ("b", None), "large": ("c", None)})


async def test_a_vote_ends_when_those_who_are_missing_change_nothing() -> None:
    found, _ = await run(spec("vote"), {"small": ("silent", None), "middle": ("yes", None), "large": ("yes", None)})
    assert (found.expert, outcomes(found)) == ("middle", ["small stopped", "middle agreed", "large agreed"])


@pytest.mark.parametrize(
    ("compare", "first", "second", "equal"),
    [
        ("last-number", "2 + 3 is 1,005.0", "So: 1005", True),
        ("last-number", "it is 4", "it is 5", False),
        ("last-line", "thinking\n\nB", "another way\n**b**", True),
        ("whole", "thinking\nB", "another way\nB", False),
    ],
)
async def test_what_must_be_equal_is_the_documents_to_say(compare: str, first: str, second: str, equal: bool) -> None:
    document = spec("vote", compare=compare, otherwise="decline")
    says = {"small": (first, None), "middle": (second, None), "large": AskFailed("down")}
    if equal:
        assert (await run(document, says))[0].expert == "small"
    else:
        with pytest.raises(Declined):
            await run(document, says)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"mode": "cascade", "experts": ["a", "b"]}, "needs a check for 'a'"),
        ({"mode": "vote", "experts": ["a", "a"]}, "each one is asked once"),
        ({"mode": "vote", "experts": ["a", "b"], "minVotes": 3}, "not so many"),
    ],
)
def test_documents_that_do_not_fit_are_refused(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        CombineSpec.model_validate(fields)
