"""Prices and memory of a document decide with the artifact: held against counting over many prompts and all subsets."""

from itertools import chain, combinations
from typing import Any

import numpy as np
import pytest

from antiphon.coe.routing.artifact import Artifact
from antiphon.coe.routing.budget import document_budget
from antiphon.coe.routing.decision import Question
from antiphon.coe.routing.router import Router
from antiphon.coe.training.data.example_table import example_table
from antiphon.coe.training.fit import Recipe
from antiphon.coe.training.train import Options, train
from antiphon.core.document.composition import CompositionSpec

PRICES = (1.0, 2.0, 9.0)


@pytest.fixture(scope="module")
def artifact() -> Artifact:
    trained, _ = train(example_table(), Options(recipe=Recipe(num_variants=1), embedder="lsa"), lambda _: None)
    return trained


def spec(
    policy: dict[str, Any], *, prices: tuple[float, ...] = PRICES, memory: tuple[str, ...] = ("8Gi", "8Gi", "8Gi")
) -> CompositionSpec:
    experts = [
        {
            "name": f"model-{i}",
            "deploymentRef": f"d{i}",
            "activeParamsB": 8,
            "memory": memory[i],
            "price": {"inputPerMtok": price, "outputPerMtok": price},
        }
        for i, price in enumerate(prices)
    ]
    return CompositionSpec.model_validate({"experts": experts, "general": "model-1", "policy": policy, "gate": {"enabled": False}})


def average_price(artifact: Artifact, document: CompositionSpec) -> float:
    router = Router(document, artifact)
    fresh = example_table(seed=11).prompts
    return float(np.mean([PRICES[int(router.route(Question(prompt=p)).decision.expert[-1])] for p in fresh]))


@pytest.mark.parametrize("limit", [1.2, 2.0, 3.0])
def test_the_average_price_of_unseen_prompts_stays_within_the_budget(artifact: Artifact, limit: float) -> None:
    assert average_price(artifact, spec({"name": "budget", "maxAvgCost": limit})) <= limit * 1.05


def test_a_budget_of_price_that_is_no_limit_costs_nothing(artifact: Artifact) -> None:
    limited = Router(spec({"name": "budget", "maxAvgCost": 100.0}), artifact)
    assert limited.budget.price_weight == 0.0
    assert limited.route(Question(prompt="which river flows through town 12")).decision.expert == "model-2"


def test_a_dear_expert_is_asked_less_under_the_cheap_policy(artifact: Artifact) -> None:
    def count(prices: tuple[float, ...]) -> int:
        router = Router(spec({"name": "cheap"}, prices=prices), artifact)
        return sum(router.route(Question(prompt=p)).decision.expert == "model-2" for p in example_table(seed=11).prompts)

    assert count((0.0, 0.0, 9.0)) <= count((9.0, 9.0, 0.0))


def test_memory_keeps_the_subset_that_a_search_over_all_subsets_finds_best(artifact: Artifact) -> None:
    document = spec({"name": "quality", "maxMemory": "16Gi"})
    router = Router(spec({"name": "quality"}), artifact)
    scores = []
    for prompt in example_table(seed=11).prompts:
        scores.append([c.score for c in router.route(Question(prompt=prompt)).decision.candidates])

    def value(subset: tuple[int, ...]) -> float:
        return float(np.asarray(scores)[:, list(subset)].max(axis=1).mean())

    fitting = [s for s in chain.from_iterable(combinations(range(3), n) for n in (1, 2)) if 1 in s]
    resident = document_budget(artifact, document).resident
    assert resident is not None
    kept = tuple(m for m in range(3) if f"model-{m}" in resident)
    assert kept in fitting
    assert value(kept) >= max(map(value, fitting)) - 0.02


def test_an_expert_that_memory_leaves_out_is_not_chosen(artifact: Artifact) -> None:
    router = Router(spec({"name": "quality", "maxMemory": "8Gi"}), artifact)
    assert {router.route(Question(prompt=p)).decision.expert for p in example_table(seed=11).prompts} == {"model-1"}
