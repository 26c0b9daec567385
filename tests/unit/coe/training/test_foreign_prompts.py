"""The gate closes on prompts of kinds that nothing was learnt from, and stays open on new prompts of known kinds.

It tells them apart by what they say: by words that the training prompts have in common, not by length or punctuation.
"""

import random
from collections.abc import Callable

import numpy as np
import pytest

from antiphon.coe.routing.artifact import Artifact
from antiphon.coe.routing.decision import Question, Reason
from antiphon.coe.routing.router import Router, judge, spec_of
from antiphon.coe.training.data.table import ScoreTable, TableExpert
from antiphon.coe.training.fit import Recipe
from antiphon.coe.training.train import Options, train

KINDS = {
    "history": "king emperor treaty battle revolution empire dynasty colony parliament siege crown war peace army republic",
    "cooking": "flour butter oven simmer garlic onion recipe whisk dough roast pepper sauce boil knife pan",
    "finance": "interest mortgage dividend portfolio inflation bond tax revenue broker hedge loan credit asset equity audit",
    "medicine": "dose symptom fever artery surgeon vaccine infection kidney diagnosis tumour nerve insulin chronic relapse clinic",
    "astronomy": "planet comet orbit telescope galaxy nebula eclipse asteroid lunar solar crater gravity photon pulsar redshift",
    "gardening": "seed soil compost prune weed shrub bulb mulch hedge lawn trellis frost rake sprout orchard",
}
COMMON = (
    "what",
    "is",
    "the",
    "of",
    "a",
    "in",
    "how",
    "does",
    "why",
    "and",
    "with",
    "for",
    "when",
    "can",
    "it",
    "from",
    "which",
    "to",
    "that",
    "on",
    "are",
    "by",
    "be",
)
EXPERTS = ("wide", "first", "second")
NUM_EACH = 150


def _of_kind(kind: str, source: random.Random) -> str:
    words = KINDS[kind].split()
    return " ".join(source.choice(words if source.random() < 0.4 else COMMON) for _ in range(source.randint(10, 30)))


def _made_up(source: random.Random) -> str:
    def word() -> str:
        return "".join(source.choice("bdfgklmnprstvz") + source.choice("aeiou") for _ in range(source.randint(2, 4)))

    return " ".join(word() for _ in range(source.randint(10, 30)))


def _german(source: random.Random) -> str:
    words = (
        "wie",
        "viele",
        "züge",
        "fahren",
        "morgen",
        "nach",
        "hamburg",
        "und",
        "wann",
        "kommt",
        "der",
        "bus",
        "zum",
        "bahnhof",
        "ohne",
        "verspätung",
        "bitte",
        "an",
    )
    return " ".join(source.choice(words) for _ in range(source.randint(10, 30)))


def _chinese(source: random.Random) -> str:
    return "".join(
        source.choice("请问这个软件怎么安装才能打开文件并且打印出来呢谢谢我想知道") for _ in range(source.randint(10, 40))
    )


def _code(source: random.Random) -> str:
    names = ("count", "total", "index", "items", "node", "queue", "buffer", "left", "right")
    lines = [
        f"    {source.choice(names)}[{source.choice(names)}] += {source.choice(names)}({source.randint(0, 99)});"
        for _ in range(source.randint(3, 9))
    ]
    return "for (int i = 0; i < n; i++) {\n" + "\n".join(lines) + "\n}"


def _letters(source: random.Random) -> str:
    return " ".join("".join(source.choice("qwxzjkvbp#%0123456789") for _ in range(7)) for _ in range(source.randint(8, 25)))


FOREIGN: dict[str, Callable[[random.Random], str]] = {
    "made-up words": _made_up,
    "German": _german,
    "Chinese": _chinese,
    "code": _code,
    "random letters": _letters,
}


def _trained(helps: bool) -> Artifact:
    """A router of six kinds, a dataset each; ``helps``: what is learnt of some kinds holds of the others too."""
    source = random.Random(3)
    rows = []
    for k, kind in enumerate(KINDS):
        good = 1 if helps else 1 + k % 2
        for _ in range(NUM_EACH):
            odds = [0.55, *(0.8 if m == good else 0.3 for m in (1, 2))]
            rows.append((_of_kind(kind, source), kind, [float(source.random() < chance) for chance in odds]))
    table = ScoreTable(
        experts=tuple(TableExpert(name=name, active_params_b=size) for name, size in zip(EXPERTS, (40.0, 8.0, 8.0), strict=True)),
        prompts=tuple(row[0] for row in rows),
        datasets=tuple(row[1] for row in rows),
        categories=tuple(row[1] for row in rows),
        scores=np.array([row[2] for row in rows]),
        source="made up",
    )
    artifact, _ = train(table, Options(recipe=Recipe(num_variants=2), embedder="lsa"), lambda message: None)
    return artifact


@pytest.fixture(scope="module", params=[False, True], ids=["kinds differ", "kinds are alike"])
def artifact(request: pytest.FixtureRequest) -> Artifact:
    return _trained(request.param)


def _closed(artifact: Artifact, draw: Callable[[random.Random], str]) -> float:
    source = random.Random(11)
    prompts = [draw(source) for _ in range(200)]
    return float(np.mean([judge(artifact, prompt, strictness=1.0, slow_path=False).gated for prompt in prompts]))


@pytest.mark.parametrize("kind", FOREIGN)
def test_the_gate_closes_on_foreign_prompts(artifact: Artifact, kind: str) -> None:
    assert _closed(artifact, FOREIGN[kind]) > 0.8


@pytest.mark.parametrize("kind", KINDS)
def test_the_gate_stays_open_on_new_prompts_of_known_kinds(artifact: Artifact, kind: str) -> None:
    assert _closed(artifact, lambda source: _of_kind(kind, source)) < 0.1


def test_what_the_gate_closes_on_is_answered_by_the_expert_that_is_best_on_the_whole(artifact: Artifact) -> None:
    router, source = Router(spec_of(artifact), artifact), random.Random(5)
    decisions = [router.route(Question(prompt=draw(source))).decision for draw in FOREIGN.values() for _ in range(20)]
    closed = [one for one in decisions if one.reason is Reason.UNCERTAIN]
    assert len(closed) > 0.8 * len(decisions)
    assert {one.expert for one in closed} == {artifact.expert_names[artifact.general]}
