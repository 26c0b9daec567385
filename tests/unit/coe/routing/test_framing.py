import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from antiphon.coe.routing.framing.core import without_framing

ASKED = "what part of the cell makes energy"


@pytest.mark.parametrize(
    "framed",
    [
        f"Hi there! I hope you are having a great day. {ASKED}",
        f"Could you please help me with the following question?\n{ASKED}",
        f"{ASKED}\n\nThank you so much for your help, I really appreciate it!",
        f"### Question:\n{ASKED}\n### Answer:\n",
        f"Good evening, {ASKED}? Please explain your answer step by step.",
        f"Bonjour, pourriez-vous m'aider avec ceci ?\n{ASKED}?\nMerci beaucoup.",
        f"Ich habe eine Frage: {ASKED}\nVielen Dank im Voraus!",
        f"您好，我想请教一个问题：{ASKED} 谢谢！",
        f"Здравствуйте! Помогите, пожалуйста.\n{ASKED} Спасибо!",
        f"You are a grumpy pirate captain. Stay in character. {ASKED}?",
        f"You are Ada, an assistant. {ASKED}",
        f"As a seasoned professor of history, {ASKED}?",
        f"{ASKED}? Explain it like I am five.",
        f"Q: Who wrote Emma?\nA: Jane Austen\n\nQ: {ASKED}\nA:",
        f"Here are some examples:\nInput: big\nOutput: large\n\nInput: {ASKED}\nOutput:",
        f"Example 1: What is the boiling point of water? 100 C\n\n{ASKED}",
    ],
)
def test_courtesies_come_off_both_ends(framed: str) -> None:
    assert without_framing(framed).strip(" ?\n") == ASKED


@pytest.mark.parametrize(
    "whole",
    [
        "",
        "Hello!",
        "Who are you? How do you do?",
        "Lily has 3 apples. I give her 2. How many do I have to buy?",
        "def add(a, b):\n    return a + b",
        "What would you do with a broken lamp?",
        "Explain gravity. I know nothing of physics.",
        "As a glacier melts, a layer of rock is exposed. Which term describes this?",
        "You are given an array of numbers. Find the largest.",
        "Bitte erkläre mir die Schwerkraft. Wie wirkt sie auf das Licht?",
        "Sort a list.\n\nExample 1:\nInput: 3 1 2\nOutput: 1 2 3\n\nExample 2:\nInput: 9 8\nOutput: 8 9",
    ],
)
def test_what_is_asked_is_never_taken_for_framing(whole: str) -> None:
    assert without_framing(whole) == whole


def test_framing_that_is_all_there_is_stays() -> None:
    assert without_framing("Please help me. Thank you!") == "Please help me. Thank you!"


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(), max_size=300))
def test_the_rest_is_a_part_of_the_prompt_and_has_no_more_framing_to_lose_than_itself(text: str) -> None:
    rest = without_framing(text)
    assert rest in text
    assert rest or not text


def test_a_very_long_prompt_is_looked_at_only_at_its_ends() -> None:
    source = random.Random(0)
    long = "".join(source.choice("ab .,!?\n") for _ in range(200_000))
    assert len(without_framing(f"Hi! {long}")) > 190_000


def test_the_question_after_many_worked_examples_is_found_and_a_long_one_is_left_whole() -> None:
    shown = "".join(f"Q: What is {n} plus {n}?\nA: {2 * n}\n\n" for n in range(5_000))
    assert without_framing(f"{shown}Q: {ASKED}\nA:") == ASKED
    long = f"{shown}Q: {'the cell ' * 2_000}\nA:"
    assert len(without_framing(long)) > 0.9 * len(long)
