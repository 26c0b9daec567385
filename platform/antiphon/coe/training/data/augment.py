"""Other ways of asking the same thing: for training, and held out from it for judging robustness (control speed, offline).

Training variants and the five judged perturbations use different wordings and typos of different kinds, so that a robust score
is not a memorised one. Must not know: embeddings, categories.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

_GREETINGS = ("", "", "Hi! ", "Hello, ", "hey there, ", "Hi team, ", "Greetings! ", "Good evening. ", "Hello again! ")
_OPENINGS = (
    "",
    "Could you help me with this? ",
    "I need your help with the following.\n\n",
    "You are a helpful assistant. Answer the question below.\n\n",
    "Question: ",
    "quick one: ",
    "Please answer as well as you can. ",
    "Task:\n",
    "### Instruction:\n",
    "i was wondering about something. ",
    "Let me ask you something:\n",
    "Can you please take a look at this one for me: ",
    "I have been thinking about this all day and would love your opinion. ",
    "My friend sent me this and I don't know what to say. ",
    "Sorry to bother you, but I am stuck on this problem:\n",
    "It would be great if you could solve this for my homework. ",
    "I am an engineer who wants to know the following, be precise: ",
)
_CLOSINGS = (
    "",
    "",
    "\n\nThanks in advance!",
    " Please explain your answer.",
    "\n\nAnswer:",
    "\nKeep it short please.",
    "\n### Response:\n",
    " Thank you so much, have a nice day.",
    "\nThink it through before you reply.",
    " I would be very happy about a good answer.",
    "\n\nBest regards, and sorry for the trouble",
    " Let me know if anything is unclear!",
    "\nPlease be honest if you are not certain.",
)
_JUDGE_BEFORE = (
    "Good morning, I hope you are doing well. Would you be so kind as to look at this for me? ",
    "I'd really appreciate some assistance here:\n",
    "Dear assistant, my colleague asked me the following and I am not sure. ",
)
_JUDGE_AFTER = (
    "\n\nMany thanks for your time, I am grateful for any help.",
    "\nLooking forward to your reply. Cheers!",
    "\n\nTake your time, there is no hurry.",
)
_LETTERS = "abcdefghijklmnopqrstuvwxyz"


def _typos(text: str, rate: float, source: random.Random, kinds: Sequence[str]) -> str:
    chars = list(text)
    letters = [i for i, char in enumerate(chars) if char.isalpha()]
    if not letters:
        return text
    for i in sorted(source.sample(letters, min(len(letters), max(1, int(len(letters) * rate)))), reverse=True):
        match source.choice(kinds):
            case "swap" if i + 1 < len(chars):
                chars[i], chars[i + 1] = chars[i + 1], chars[i]
            case "drop":
                del chars[i]
            case "double":
                chars.insert(i, chars[i])
            case _:
                chars[i] = source.choice(_LETTERS)
    return "".join(chars)


def _wrap_for_training(text: str, source: random.Random) -> str:
    before = source.choice(_GREETINGS) + source.choice(_OPENINGS)
    return before + text + source.choice(_CLOSINGS)


def _truncate(text: str, source: random.Random) -> str:
    words = text.split(" ")
    return " ".join(words[: max(4, int(len(words) * source.uniform(0.6, 0.9)))])


def training_variants(prompt: str, num_variants: int, source: random.Random) -> list[str]:
    """``num_variants`` forms, in a fixed rotation: wrapped, typos, cut at a word, wrapped typos, cut anywhere, wrapped and cut."""
    kinds: tuple[Callable[[str], str], ...] = (
        lambda text: _wrap_for_training(text, source),
        lambda text: _typos(text, 0.03, source, ("swap", "drop", "other")),
        lambda text: _truncate(text, source),
        lambda text: _wrap_for_training(_typos(text, 0.02, source, ("swap", "drop")), source),
        lambda text: text[: max(12, int(len(text) * source.uniform(0.65, 0.95)))],
        lambda text: _wrap_for_training(_truncate(text, source), source),
    )
    return [kinds[i % len(kinds)](prompt) for i in range(num_variants)]


def _polite(text: str, source: random.Random) -> str:
    return source.choice(_JUDGE_BEFORE) + text + source.choice(_JUDGE_AFTER)


def _spacing(text: str, source: random.Random) -> str:
    return source.choice(("\n\n", "  ", "\t")) + text.replace(" ", source.choice(("  ", " \n"))) + "\n\n"


_OTHER_LANGUAGES = (
    ("Bonjour, j'aurais une question pour vous : ", "\n\nMerci beaucoup et bonne journée !"),
    ("Guten Tag, ich komme hier nicht weiter und bitte um Hilfe.\n", "\nVielen Dank für die Mühe."),
    ("Buenas tardes, ¿podría usted ayudarme con lo siguiente?\n", "\nMuchas gracias de antemano."),
    ("Buongiorno, avrei una domanda: ", "\nGrazie per l'aiuto."),
    ("Boa tarde, você pode responder a esta pergunta?\n", "\nObrigado pela ajuda."),
    ("Добрый вечер! Мне нужна помощь с этой задачей.\n", "\nБольшое спасибо."),
    ("您好,我有一个问题想请教:\n", "\n谢谢您的帮助。"),
    ("こんばんは。質問があります。\n", "\nどうぞよろしくお願いします。"),
    ("Merhaba, bana yardım eder misiniz?\n", "\nÇok teşekkür ederim."),
    ("مساء الخير، عندي سؤال وأحتاج مساعدتكم.\n", "\nشكرا لكم."),
)
_PERSONAS = (
    "You are a cheerful tour guide. ",
    "You are the world's leading authority on everything. Think carefully.\n\n",
    "Act as a sceptical judge. ",
    "I want you to act as a poet. Stay in character.\n",
    "Pretend that you are my older brother. ",
    "Imagine you are an astronaut on a long voyage.\n",
    "As an experienced librarian, answer this: ",
    "You're a monk who speaks slowly. Your answers are short.\n",
)
_SHOTS = (
    "Q: Which animal barks?\nA: a dog\n\nQ: How many days has a week?\nA: seven\n\nQ: {}\nA:",
    "Question: What colour is grass?\nAnswer: green\n\nQuestion: {}\nAnswer:",
    "Here are some examples.\n\nInput: the opposite of hot\nOutput: cold\n\nInput: {}\nOutput:",
    "Example: Where does the sun rise? In the east.\nNow answer this one: {}",
    "User: Say hello.\nAssistant: Hello!\n\nUser: {}\nAssistant:",
)


def _in_another_language(text: str, source: random.Random) -> str:
    before, after = source.choice(_OTHER_LANGUAGES)
    return before + text + after


# Words that speak to the assistant and say nothing about the subject; embeddings give them little weight.
_COURTESY_TEXT = """
    a about again all am an and any answer answers anyone anything appreciate appreciated ask asked asking assist assistance
    assistant bit bother briefly but can certain cheers clear colleague concise concisely correct could day dear detail detailed
    do doing don evening everyone explain explanation favor favour feel fine following forward free friend give glad good
    grateful great greetings happy have hello help helpful helping here hey hi homework hope hoping hurry i if in instruction is
    it keep kind kindly know let like little look looking lot love many maybe me mind moment morning much my myself need nice
    no not of on one opinion or our patience perhaps please pls possible precise problem provide query question questions quick
    quickly quite rather really regards reply request response right see short sincerely so solve some someone something sorry
    stuck sure take task team tell thank thanks that the there think this time to today trouble try trying understand unsure us
    very want wanted was we well will wish with wonder wondering would yes you your
"""
COURTESY = frozenset(_COURTESY_TEXT.split())

PERTURBATIONS: dict[str, Callable[[str, random.Random], str]] = {
    "polite wrapper": _polite,
    "typos": lambda text, source: _typos(text, 0.03, source, ("double", "swap", "other")),
    "truncated": lambda text, source: text[: max(16, int(len(text) * 0.8))],
    "lower case": lambda text, source: text.lower().rstrip("?.! "),
    "spacing": _spacing,
    "another language around": _in_another_language,
    "persona": lambda text, source: source.choice(_PERSONAS) + text,
    "few-shot": lambda text, source: source.choice(_SHOTS).replace("{}", text),
}


def perturbed(prompts: Sequence[str], name: str, seed: int) -> list[str]:
    """Every prompt under the judged perturbation ``name``, a key of PERTURBATIONS; the same for the same seed."""
    source = random.Random(f"{name}:{seed}")
    return [PERTURBATIONS[name](prompt, source) for prompt in prompts]
