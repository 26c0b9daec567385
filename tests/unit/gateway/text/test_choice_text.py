"""One choice's text: independent of how its tokens come."""

from __future__ import annotations

import functools

from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from antiphon.gateway.text.choice_text import ChoiceText
from antiphon.gateway.text.tokenizer import TextModel


@functools.cache
def model() -> TextModel:
    vocab = {char: index for index, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE({**vocab, "ab": 256, "ba": 257}, [("a", "b"), ("b", "a")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<eos>"])
    return TextModel(tokenizer, chat_template=None, eos_token_ids=())


def ids(text: str) -> list[int]:
    return list(model().encode(text, add_special_tokens=False))


EOS = ids("<eos>")[0]
TOKENS = st.lists(st.sampled_from([*ids("abab ba"), EOS, *ids("é")]), max_size=25)
STOPS = st.lists(st.sampled_from(["ab", "ba", "aab", " ", "é", "bab"]), max_size=3)


@settings(deadline=None)
@given(TOKENS, STOPS, st.integers(0, 10), st.lists(st.integers(1, 5), max_size=12))
def test_runs_of_tokens_give_what_single_tokens_give(tokens: list[int], stops: list[str], least: int, sizes: list[int]) -> None:
    single = ChoiceText(model(), stops=stops, min_tokens=least)
    runs = ChoiceText(model(), stops=stops, min_tokens=least)
    one_by_one = ""
    for token in tokens:
        one_by_one += single.feed([token]).text
        if single.stop_string is not None:
            break
    in_runs, position = "", 0
    for size in [*sizes, len(tokens)]:
        in_runs += runs.feed(tokens[position : position + size]).text
        position += size
        if runs.stop_string is not None or position >= len(tokens):
            break
    assert (in_runs, runs.stop_string, runs.num_tokens) == (one_by_one, single.stop_string, single.num_tokens)


@settings(deadline=None)
@given(TOKENS, STOPS)
def test_text_up_to_the_finish_is_the_decoded_text_cut_at_the_stop(tokens: list[int], stops: list[str]) -> None:
    choice = ChoiceText(model(), stops=stops)
    piece = choice.finish(tokens, stop_token=False)
    full = model().decode(tokens)
    if choice.stop_string is None:
        assert piece.text == full
        assert piece.num_tokens == len(tokens)
    else:
        assert full.startswith(piece.text + choice.stop_string)


def test_a_stop_strings_token_counts_and_those_after_it_do_not() -> None:
    choice = ChoiceText(model(), stops=["b"])
    piece = choice.feed([*ids("a"), *ids("b"), *ids("a")])
    assert (piece.text, piece.num_tokens, choice.stop_string) == ("a", 2, "b")


def test_a_stop_token_gives_no_text_unless_asked_for() -> None:
    a, b = ids("a")[0], ids("b")[0]
    assert ChoiceText(model()).finish([a, b], stop_token=True).text == "a"
    assert ChoiceText(model(), include_stop=True).finish([a, b], stop_token=True).text == "ab"
    assert ChoiceText(model()).finish([a, b], stop_token=True).num_tokens == 2


def test_stop_strings_within_the_least_tokens_do_not_count() -> None:
    choice = ChoiceText(model(), stops=["a"], min_tokens=2)
    a, b = ids("a")[0], ids("b")[0]
    assert choice.feed([a, a]).text == "aa"
    assert choice.stop_string is None
    assert choice.feed([b, a, b]).text == "b"
    assert choice.stop_string == "a"


def test_what_was_held_back_for_a_stop_comes_at_the_finish() -> None:
    choice = ChoiceText(model(), stops=["abb"])
    assert choice.feed([*ids("a")]).text == ""
    assert choice.finish(ids("b"), stop_token=False).text == "ab"


def test_a_stop_string_that_begins_within_the_least_tokens_and_ends_after_them_counts() -> None:
    choice = ChoiceText(model(), stops=["bab"], min_tokens=2)
    assert choice.feed([*ids("a"), *ids("b")]).text == "a"
    piece = choice.feed([*ids("a"), *ids("b"), *ids("a")])
    assert (piece.text, piece.num_tokens, choice.stop_string) == ("", 2, "bab")


@settings(deadline=None)
@given(st.text(alphabet="abz", max_size=25), STOPS, st.integers(0, 10))
def test_the_least_tokens_only_put_off_where_a_stop_string_may_end(text: str, stops: list[str], least: int) -> None:
    tokens = [token for char in text for token in ids(char)]
    choice = ChoiceText(model(), stops=stops, min_tokens=least)
    piece = choice.finish(tokens, stop_token=False)
    ends = [end for end in range(least + 1, len(text) + 1) if any(text[:end].endswith(stop) for stop in stops)]
    if not ends:
        assert (piece.text, choice.stop_string) == (text, None)
    else:
        longest = max((stop for stop in stops if text[: ends[0]].endswith(stop)), key=len)
        assert (piece.text, choice.stop_string) == (text[: ends[0] - len(longest)], longest)


def test_tokens_of_one_character_all_stand_where_it_stands() -> None:
    tokens = [byte for char in "😀é🦜" for byte in ids(char)]
    piece = ChoiceText(model()).finish(tokens, stop_token=False)
    assert piece.offsets == (0, 0, 0, 0, 1, 1, 2, 2, 2, 2)


@settings(deadline=None)
@given(TOKENS, STOPS)
def test_no_token_stands_beyond_the_text(tokens: list[int], stops: list[str]) -> None:
    piece = ChoiceText(model(), stops=stops).finish(tokens, stop_token=False)
    assert len(piece.offsets) == piece.num_tokens
    assert list(piece.offsets) == sorted(piece.offsets)
    assert all(0 <= offset <= len(piece.text) for offset in piece.offsets)
