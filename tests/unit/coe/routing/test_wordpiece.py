import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from antiphon.coe.routing.wordpiece import WordPiece, window
from antiphon.core.errors import CheckpointInvalid

TOKENS = WordPiece(["[UNK]", "[CLS]", "[SEP]", "un", "##aff", "##able", "want", "##ed", "runn", "##ing", ",", "a", "中"])


def _words(text: str) -> list[str]:
    return [TOKENS.vocabulary[i] for i in TOKENS.encode(text, 100)]


def test_the_longest_piece_wins() -> None:
    assert _words("unwanted running") == ["[UNK]", "runn", "##ing"]
    assert _words("unaffable") == ["un", "##aff", "##able"]


def test_case_and_accents_do_not_matter() -> None:
    assert _words("Wantéd, ÄA") == ["want", "##ed", ",", "[UNK]"]
    assert _words("WANTED") == _words("wanted")


def test_ideographs_and_marks_stand_alone() -> None:
    assert _words("a中a,a") == ["a", "中", "a", ",", "a"]


def test_an_endless_word_is_unknown() -> None:
    assert _words("a" * 101) == ["[UNK]"]


def test_no_more_than_max_tokens_come_back() -> None:
    assert len(TOKENS.encode("a " * 1000, 7)) == 7


def test_a_vocabulary_without_special_tokens_is_refused() -> None:
    with pytest.raises(CheckpointInvalid, match=r"\[SEP\]"):
        WordPiece(["[UNK]", "[CLS]"])


def test_the_window_keeps_head_and_tail() -> None:
    assert window("abcdefgh", 3, 2) == "abc gh"
    assert window("abcde", 3, 2) == "abcde"
    assert window("abcdefgh", 3, 0) == "abc"


@settings(max_examples=300, deadline=None)
@given(st.text(st.characters(), max_size=200))
def test_any_text_has_ids_of_the_vocabulary(text: str) -> None:
    assert all(0 <= i < len(TOKENS.vocabulary) for i in TOKENS.encode(text, 50))


@given(st.text(st.characters(max_codepoint=127), max_size=100))
def test_ascii_has_the_words_that_any_text_has(text: str) -> None:
    """A letter that is not ASCII, at the end, sends the same text the long way; control characters are dropped there alone."""
    plain = "".join(char for char in text if " " <= char < "\x7f" or char in "\t\n\r")
    assert [*WordPiece.words(plain), "e"] == WordPiece.words(plain + " é")
