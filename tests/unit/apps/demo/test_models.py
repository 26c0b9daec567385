"""The demo's small models: what is asked, how answers are judged, and that a checkpoint is one as any other."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from antiphon.apps.demo import models as demo_models
from antiphon.apps.demo.composition import SHOWN, Question, is_right, questions


@pytest.mark.parametrize("skill", demo_models.SKILLS)
def test_what_training_leaves_out_is_never_drawn_for_it(skill: str) -> None:
    source = random.Random(1)
    trained = {demo_models.draw(skill, source, held_out=False).text for _ in range(500)}
    asked = {demo_models.draw(skill, source, held_out=True).text for _ in range(500)}
    assert not trained & asked


def test_the_steps_of_a_sum_end_in_its_result() -> None:
    source = random.Random(2)
    for _ in range(200):
        drawn = demo_models.draw("sums", source, held_out=False)
        first, second = (int(word) for word in drawn.text.rstrip("?.").split() if word.isdigit())
        result = int(drawn.right.split(": ")[1])
        assert result in (first + second, abs(first - second))


def test_questions_of_the_table_are_held_out_and_none_is_shown() -> None:
    rows = questions()
    assert not {row.text for row in rows} & set(SHOWN)
    assert {row.category for row in rows} == {"chat", *demo_models.SKILLS}
    trained = {demo_models.draw("morse", random.Random(seed), held_out=False).text for seed in range(300)}
    assert not {row.text for row in rows} & trained


@pytest.mark.parametrize(
    ("right", "answer", "judged"),
    [("-.-", "-.-", True), ("-.-", "It is -.-", True), ("-.-", "--.-", False), (".", "K is a letter.", False)],
)
def test_a_code_is_right_only_when_it_stands_alone(right: str, answer: str, judged: bool) -> None:
    question = Question(text="", dataset="encode", category="morse", right=right)
    assert is_right(question, answer) is judged


def test_a_checkpoint_gives_transformers_the_logits_it_was_trained_with(tmp_path: Path) -> None:
    weights = demo_models.train("morse", seed=3, num_steps=2)
    demo_models.write(tmp_path, weights)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    messages = [{"role": "user", "content": "What is Q in Morse code?"}]
    tokens_BT = tokenizer.apply_chat_template(messages, return_tensors="pt", return_dict=True)["input_ids"]
    with torch.inference_mode():
        expected_BTV = model(tokens_BT).logits
        torch.testing.assert_close(demo_models._forward(weights, tokens_BT), expected_BTV, rtol=1e-4, atol=1e-4)
