"""The fast path in C beside its twin in numpy, on vectors and heads drawn at random."""

import random
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from antiphon.coe.routing.assessment import Fitted, Gate, Likeness, Mix, Ready, assess
from antiphon.coe.routing.embedding import NUM_SHAPE, StaticEmbedding, WordVectors, quantised
from antiphon.coe.routing.native import build
from antiphon.coe.routing.wordpiece import WordPiece
from antiphon.native_build import Extension

pytestmark = pytest.mark.skipif(build.load() is None, reason="no C compiler or no Python header")

PIECES = ("a", "b", "e", "q", "s", "the", "ed", "ing", "12", "é", "в", "中", "ß")
VOCABULARY = (
    *("[UNK]", "[CLS]", "[SEP]", "the", "the", "river", "café", "где", "中", "?", ".", "=", "_", "x" * 100, "x" * 101),
    *PIECES,
    *("##" + piece for piece in PIECES),
)
WORDS = (
    "the",
    "river",
    "12",
    "café",
    "где",
    "中",
    "x" * 101,
    "a",
    "the",
    "ed_12",
    "中中",
    "sing",
    "rivers",
    "diver",
    "dine",
    "dinner",
)
NUM_TEXTS = np.array([9, 5, 5, 5, 5, 5, 5, 5, 9, 5, 5, 3, 5, 7, 3, 2], np.int32)
TEXTS = (
    *(
        "",
        " \n\t",
        "The river, the RIVER; the river?",
        "sing\x1csing\x00a",
        "Café café CAFÉ cafe\u0301 где\u200b ГДЕ",
        "a\ud800b \udfff",
    ),
    *("rivre riverx rver riber RIVERS ivers dever", "sign snig singe ding din dinne dinneer xdinner", "café riv\u00e9r rivre"),
    *("x" * 99, "x" * 100, "x" * 101, "é" * 100, "в" * 401, "ing#ed_12", "f(x) = {3: [1, 2]}; $\\alpha^2$ 'and' \"so\" - */"),
    *(
        "a" * 200_000,
        "中" * 200_000,
        "a 12 " * 40_000,
        "\U0001f600" * 50_000,
        "ﷺİıſß" * 700,
        "\x00\x01" * 9_000,
        "the river " * 4_000,
    ),
)
_source = np.random.default_rng(0)


def _embedding(*, topics: bool = True, words: bool = True) -> StaticEmbedding:
    return StaticEmbedding(
        tokens=WordPiece(VOCABULARY),
        near=quantised(_source.normal(size=(len(VOCABULARY), 33))),
        topics=quantised(_source.normal(size=(len(VOCABULARY), 16))) if topics else None,
        words=WordVectors(words=WORDS, vectors=quantised(_source.normal(size=(len(WORDS), 9)), np.int16), num_texts_U=NUM_TEXTS)
        if words
        else None,
    )


EMBEDDING = _embedding()
PLAIN = replace(EMBEDDING, native=False)


@pytest.mark.parametrize("text", TEXTS, ids=lambda text: repr(text[:12]))
def test_odd_and_long_texts_have_the_same_embedding(text: str) -> None:
    assert np.allclose(EMBEDDING.encode(text), PLAIN.encode(text), rtol=0, atol=1e-6)


@settings(max_examples=300, deadline=None)
@given(
    text=st.text(st.one_of(st.characters(max_codepoint=127), st.sampled_from(" aethingdsqЯé中_?#"), st.characters()), max_size=400)
)
def test_any_text_has_the_same_embedding(text: str) -> None:
    assert np.allclose(EMBEDDING.encode(text), PLAIN.encode(text), rtol=0, atol=1e-6)


@settings(max_examples=300, deadline=None)
@given(text=st.text(st.sampled_from("rivedsng "), max_size=120))
def test_any_misspelt_word_is_meant_to_be_the_same(text: str) -> None:
    assert np.allclose(EMBEDDING.encode(text), PLAIN.encode(text), rtol=0, atol=1e-6)


@pytest.mark.parametrize("text", TEXTS, ids=lambda text: repr(text[:12]))
def test_artifacts_of_older_formats_are_read_with_the_words_of_the_window(text: str) -> None:
    assert EMBEDDING.words is not None
    older = replace(EMBEDDING, whole_words=False, words=replace(EMBEDDING.words, num_texts_U=None))
    assert np.allclose(older.encode(text), replace(older, native=False).encode(text), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("topics", "words"), [(False, False), (True, False), (False, True)])
def test_parts_may_be_missing_and_one_text_leaves_nothing_for_the_next(topics: bool, words: bool) -> None:
    embedding = _embedding(topics=topics, words=words)
    plain, again = replace(embedding, native=False), embedding.encode(TEXTS[2])
    for text in TEXTS:
        assert np.allclose(embedding.encode(text), plain.encode(text), rtol=0, atol=1e-6)
    assert np.array_equal(embedding.encode(TEXTS[2]), again)


def _heads(
    source: random.Random, *, word_share: float, value_share: float, caution: float, hold: float
) -> tuple[Fitted, Mix, Gate]:
    D, F, M, C = EMBEDDING.num_dimensions, source.randint(1, 9), source.randint(1, 7), source.randint(1, 4)
    K = source.randint(0, 5)
    H = F + M + K + (F if word_share or hold else 0)
    heads_DH = _source.normal(size=(D, H)).astype(np.float32)
    heads_DH[: D // 2, F + M + K :] = 0.0
    heads_DH[D // 2 :, : F + M + K] = 0.0
    heads_DH[:, F + M : F + M + K] *= np.float32(0.1)
    fitted = Fitted(
        heads_DH=heads_DH,
        bias_H=_source.normal(size=H).astype(np.float32),
        temperature=1.7,
        category_F=_source.integers(0, C, F),
        class_scores_FM=_source.random((F, M)).astype(np.float32),
        category_scores_CM=_source.random((C, M)).astype(np.float32),
        plain_scores_FM=_source.random((F, M)).astype(np.float32),
        mean_M=_source.random(M).astype(np.float32),
        general=source.randrange(M),
        landmarks_ND=np.zeros((1, D), np.float32),
        likeness=Likeness(
            centres_FK=_source.normal(size=(F, K)).astype(np.float32), bias_F=_source.normal(size=F).astype(np.float32)
        ),
    )
    mix = Mix(category_share=0.4, value_share=value_share, trust=0.3, word_share=word_share, hold=hold, strange_hold=2 * hold)
    return fitted, mix, Gate(weight=0.8, bias=-2.0, threshold=0.5, caution=caution, caution_below=0.7)


@pytest.mark.parametrize(
    ("word_share", "value_share", "caution", "hold"),
    [(0.3, 0.2, 0.1, 0.0), (0.0, 0.7, 0.1, 0.0), (0.45, 0.0, 0.0, 0.3), (1.0, 0.4, 0.12, 0.02), (0.0, 0.0, 0.06, 0.06)],
)
def test_heads_say_the_same_of_any_embedding(word_share: float, value_share: float, caution: float, hold: float) -> None:
    source = random.Random(3)
    for _ in range(8):
        fitted, mix, gate = _heads(source, word_share=word_share, value_share=value_share, caution=caution, hold=hold)
        native, plain = Ready(fitted, mix, gate), Ready(fitted, mix, gate, native=False)
        for text, scale in zip(TEXTS[2:14], np.geomspace(0.1, 40.0, 12).astype(np.float32), strict=True):
            embedding = EMBEDDING.encode(text) * scale
            for threshold in (0.0, 0.5, 2.0):
                found, expected = native.assess(embedding, threshold), plain.assess(embedding, threshold)
                assert np.allclose(found[0], expected[0], rtol=1e-4, atol=1e-5)
                assert np.allclose(found[1], expected[1], rtol=1e-4, atol=1e-5)
                assert np.allclose(found[2], expected[2], rtol=1e-4, atol=1e-5)
                assert found[3] == pytest.approx(expected[3], rel=1e-4)
            served = assess(fitted.raw(embedding[None]), fitted, mix, gate)  # as training computes it
            _, scores, leads, _ = native.assess(embedding, gate.threshold)
            assert np.allclose(served.scores_BM[0], scores, rtol=1e-4, atol=1e-5)
            assert np.allclose(served.leads_BM[0], leads, rtol=1e-4, atol=1e-5)


def test_what_does_not_fit_is_refused() -> None:
    reader = EMBEDDING.reader
    assert reader is not None
    room = np.zeros(EMBEDDING.num_dimensions, np.float32)
    good = ("a", None, "a", None)
    for wrong in (
        (b"a", None, "a", None, room),
        ("é", None, "a", None, room),
        ("a", None, "é", None, room),
        ("a", ["a", 3], "a", None, room),
        ("a", None, "a", ["a", 3], room),
        (*good, room[:-1]),
        ("a", ["\ud800"], "a", None, room),
    ):
        with pytest.raises((TypeError, ValueError)):
            reader.encode(*wrong)
    assert np.allclose(EMBEDDING.encode("a the"), PLAIN.encode("a the"), atol=1e-6)
    fitted, mix, gate = _heads(random.Random(1), word_share=0.3, value_share=0.2, caution=0.1, hold=0.02)
    with pytest.raises(ValueError, match="embedding"):
        Ready(fitted, mix, gate).assess(room[:NUM_SHAPE], 0.1)


def test_an_image_carries_the_module_and_takes_it_without_a_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["build", "--into", str(tmp_path)])
    assert Extension.command(replace(build.ROUTER, flags=("-O0",))) == 0
    monkeypatch.setenv("ANTIPHON_KERNELS", str(tmp_path))
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("ANTIPHON_CACHE", str(tmp_path / "nothing"))
    module = build.load.__wrapped__()
    assert module is not None
    assert Path(module.__file__ or "").parent == tmp_path
    monkeypatch.setenv("ANTIPHON_NATIVE", "0")
    assert build.load.__wrapped__() is None
