from dataclasses import replace

import numpy as np
import pytest
from sklearn.feature_extraction.text import TfidfVectorizer

from antiphon.coe.training.data.example_table import example_table
from antiphon.coe.training.encoders.static import from_prompts
from antiphon.coe.training.encoders.words import fit_words, known_frames, word_counts, word_rows

PROMPTS = example_table(num_per_dataset=12, num_datasets=2).prompts
ASKED = (
    "add the sums and add the numbers 3 and 39",
    "which river flows through town 8?",
    "whihc rivr flowss thruogh twon 8?",
    "",
    "zzz",
)


def test_texts_are_as_near_as_in_plain_tf_idf() -> None:
    embedding = from_prompts(PROMPTS, 0)
    known = word_counts(embedding, PROMPTS)
    words, _ = fit_words(known, np.arange(len(PROMPTS)), 200, 0)
    ours = word_rows(known, np.arange(len(PROMPTS)), words)
    vectorizer = TfidfVectorizer(sublinear_tf=True)
    reference = vectorizer.fit_transform(PROMPTS).toarray()
    # As many directions as texts span but one: what stays between the two is that one and the rounding to sixteen bits.
    assert float(np.abs(ours @ ours.T - reference @ reference.T).mean()) < 0.01


def test_one_text_at_a_time_is_seen_as_many_are() -> None:
    embedding = from_prompts(PROMPTS, 0)
    known = word_counts(embedding, PROMPTS)
    words, _ = fit_words(known, np.arange(len(PROMPTS)), 16, 0)
    many = word_rows(known.of(embedding, ASKED), np.arange(len(ASKED)), words)
    for row, text in zip(many, ASKED, strict=True):
        alone = np.zeros(16, np.float32)
        words.direction(embedding.words_of(text), embedding.tokens, alone)
        assert alone == pytest.approx(row, abs=1e-5)


def test_words_of_texts_that_are_not_learnt_from_have_no_vector() -> None:
    texts = [*PROMPTS, "unheard unheard"]
    known = word_counts(from_prompts(texts, 0), texts)
    assert "unheard" in known.words
    assert "unheard" not in fit_words(known, np.arange(len(PROMPTS)), 8, 0)[0].words


def test_a_template_of_the_prompts_stays_and_what_somebody_puts_around_comes_off() -> None:
    texts = [f"Question: which river flows through town {i}?\nAnswer:" for i in range(5)]
    embedding = replace(from_prompts(texts, 0), known_frames=known_frames(texts))
    assert embedding.words_of(texts[3]) == embedding.words_learnt(texts[3])
    polite = "Hello, could you help me with this please? " + PROMPTS[0]
    assert "hello" not in embedding.words_of(polite)


def test_a_misspelt_prompt_is_seen_as_it_was_meant() -> None:
    texts = [f"{word} {other} question" for word in ("river", "mountain", "village") for other in ("where", "which", "whose")]
    embedding = from_prompts(texts, 0)
    known = word_counts(embedding, texts)
    words, _ = fit_words(known, np.arange(len(texts)), 6, 0)
    asked = ("river where question", "rivre whree qeustion", "rive wheree questipn", "rumour whence quotation")
    meant, swapped, slipped, other = word_rows(known.of(embedding, asked), np.arange(4), words)
    assert swapped == pytest.approx(meant, abs=1e-6)
    assert slipped == pytest.approx(meant, abs=1e-6)
    assert not other.any()
