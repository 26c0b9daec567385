"""Stop strings against brute force."""

from __future__ import annotations

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from antiphon.gateway.text.stops import StopMatcher

LETTERS = st.text(alphabet="ab\n", max_size=30)
STOPS = st.lists(st.text(alphabet="ab\n", min_size=1, max_size=5), min_size=1, max_size=4)


def brute_force(text: str, stops: list[str]) -> tuple[str, str | None]:
    """The first prefix of the text that ends with a stop string, without the longest such."""
    for end in range(len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            longest = max(ending, key=len)
            return text[: end - len(longest)], longest
    return text, None


def pieces_of(text: str, cuts: list[int]) -> list[str]:
    places = sorted({cut % (len(text) + 1) for cut in cuts})
    return [text[start:end] for start, end in zip([0, *places], [*places, len(text)], strict=True)]


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(LETTERS, STOPS, st.lists(st.integers(0, 1000), max_size=10))
def test_the_text_is_cut_where_brute_force_cuts_it_however_it_comes(text: str, stops: list[str], cuts: list[int]) -> None:
    matcher = StopMatcher(stops)
    given_out = ""
    for piece in pieces_of(text, cuts):
        given_out += matcher.feed(piece)
        if matcher.matched is not None:
            break
    else:
        given_out += matcher.flush()
    assert (given_out, matcher.matched) == brute_force(text, stops)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(LETTERS, STOPS)
def test_what_is_given_out_is_never_a_part_of_a_later_match(text: str, stops: list[str]) -> None:
    cut, _ = brute_force(text, stops)
    matcher = StopMatcher(stops)
    given_out = ""
    for char in text:
        given_out += matcher.feed(char)
        assert cut.startswith(given_out)
        if matcher.matched is not None:
            return


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(LETTERS, STOPS)
def test_no_more_is_held_back_than_could_begin_a_stop(text: str, stops: list[str]) -> None:
    matcher = StopMatcher(stops)
    fed = given_out = ""
    for char in text:
        fed += char
        given_out += matcher.feed(char)
        if matcher.matched is not None:
            return
        held = fed[len(given_out) :]
        assert not held or any(stop.startswith(held) for stop in stops)


def test_the_stop_string_stays_when_asked_for() -> None:
    matcher = StopMatcher(["END"], include_stop=True)
    assert matcher.feed("so E") == "so "
    assert matcher.feed("NDless") == "END"
    assert matcher.matched == "END"


def test_without_stops_nothing_is_held_back() -> None:
    matcher = StopMatcher([])
    assert matcher.feed("abc") == "abc"
    assert matcher.flush() == ""
