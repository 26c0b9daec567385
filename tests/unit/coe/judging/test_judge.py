import random
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from antiphon.coe.judging.judge import aiq, by_dataset, by_prompt, calibration_error, estimate, left_out_groups, two_models
from antiphon.coe.routing.assessment import Assessment
from antiphon.coe.training.data.augment import PERTURBATIONS, perturbed, training_variants
from antiphon.coe.training.data.example_table import example_table
from antiphon.coe.training.data.labels import grow, label
from antiphon.coe.training.fit import Recipe, folds_of
from antiphon.coe.training.frontier import Foreign, FrontierPoint, frontier, policies_of, worthy_experts
from antiphon.coe.training.gating import OPEN
from antiphon.coe.training.heads import fit_classes, fit_values, prior_rows, shrunken_means, steadying
from antiphon.coe.training.train import Options, prepare


def test_calibration_error_is_the_gap_weighted_by_bins() -> None:
    confidence = np.array([0.95] * 10 + [0.55] * 10)
    right = np.array([True] * 9 + [False] + [True] * 5 + [False] * 5)
    assert calibration_error(confidence, right) == pytest.approx(0.5 * 0.05 + 0.5 * 0.05)
    assert calibration_error(np.ones(4), np.ones(4, bool)) == 0.0


def test_the_interval_of_a_mean_is_that_of_its_standard_error() -> None:
    values = np.random.default_rng(0).normal(1.0, 2.0, 4000)
    found = estimate(values, 0)
    half = 1.96 * 2.0 / np.sqrt(4000)
    assert found.mean == pytest.approx(values.mean())
    assert (found.high - found.low) / 2 == pytest.approx(half, rel=0.1)


def test_aiq_is_the_mean_height_of_the_upper_hull() -> None:
    assert aiq([(1.0, 0.5), (3.0, 0.9)]) == pytest.approx(0.7)
    assert aiq([(1.0, 0.5), (2.0, 0.6), (3.0, 0.9)]) == pytest.approx(0.7)  # below the hull
    assert aiq([(1.0, 0.5), (2.0, 0.9), (3.0, 0.4)]) == pytest.approx((0.7 + 0.9) / 2)  # never falls
    assert aiq([(2.0, 0.4)]) == pytest.approx(0.4)


def test_a_perfect_order_of_two_models_recovers_early_and_a_random_one_half() -> None:
    scores = np.zeros((1000, 2))
    scores[:500, 1] = 1.0  # the strong one is better on the first half
    perfect = two_models(scores[:, 1] - scores[:, 0], scores, 0, 1)
    assert perfect.cpt_50 == pytest.approx(0.25, abs=0.01)
    assert perfect.apgr == pytest.approx(0.75, abs=0.01)
    chance = two_models(np.random.default_rng(0).random(1000), scores, 0, 1)
    assert chance.apgr == pytest.approx(0.5, abs=0.05)


def test_shrunken_means_draw_few_rows_to_the_prior() -> None:
    means = shrunken_means(np.array([0, 0, 1]), np.array([[1.0], [1.0], [0.0]]), 3, np.array([0.5]), 2.0)
    assert means[:, 0].tolist() == pytest.approx([(2 + 1) / 4, 1 / 3, 0.5])


def test_experts_that_bring_nothing_are_left_out() -> None:
    scores = np.array([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]] * 50)
    expected = scores.astype(np.float32) * 0.9
    assert worthy_experts(expected, scores, np.zeros(100, np.int64), np.zeros(3), 0, 0.003) == (0, 1)


def test_an_expert_that_only_a_small_category_needs_is_kept() -> None:
    scores = np.zeros((1000, 3))
    scores[:995, 0] = 1.0
    scores[995:, 2] = 1.0  # five prompts of a thousand: half a point in all, everything to their category
    category = np.r_[np.zeros(995, np.int64), np.ones(5, np.int64)]
    assert worthy_experts(scores.astype(np.float32), scores, category, np.zeros(3), 0, 0.01) == (0, 2)


def test_cheap_is_never_dearer_than_balanced_and_ties_go_to_the_cheaper() -> None:
    def point(cost: float, score: float) -> FrontierPoint:
        return FrontierPoint(weight=0.0, avg_cost=cost, score=score, experts=(0,))

    points = [point(50.0, 0.700), point(40.0, 0.697), point(30.0, 0.697), point(20.0, 0.60)]
    found = policies_of(points, best_single=0.6995)  # the best single expert is better than balanced
    assert points[found["cheap"]].avg_cost <= points[found["balanced"]].avg_cost == 30.0
    assert found["quality"] == 0


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.floats(1, 70), st.floats(0, 1), st.booleans()), min_size=1, max_size=12), st.floats(0, 1))
def test_no_frontier_makes_cheap_dearer_than_balanced_or_either_harmful(
    found: list[tuple[float, float, bool]], best_single: float
) -> None:
    points = [
        FrontierPoint(weight=0.0, avg_cost=cost, score=score, experts=(0,), harmless=harmless or i == 0)
        for i, (cost, score, harmless) in enumerate(found)
    ]
    chosen = policies_of(points, best_single)
    assert points[chosen["cheap"]].avg_cost <= points[chosen["balanced"]].avg_cost
    assert all(points[point].harmless for point in chosen.values())


def test_cheap_spends_no_more_than_what_quality_is_ahead_of_the_plain_router() -> None:
    def point(cost: float, score: float, lost: float, lost_plain: float) -> FrontierPoint:
        return FrontierPoint(weight=0.0, avg_cost=cost, score=score, experts=(0,), lost=lost, lost_plain=lost_plain)

    ahead = [point(50.0, 0.700, 0.0, -0.01), point(40.0, 0.69, 0.01, 0.001), point(30.0, 0.68, 0.02, 0.01)]
    assert policies_of(ahead, best_single=0.6)["cheap"] == 1
    behind = [point(50.0, 0.700, 0.0, 0.004), point(40.0, 0.70, 0.003, 0.0035), point(30.0, 0.68, 0.02, 0.01)]
    assert policies_of(behind, best_single=0.6)["cheap"] == 0  # nothing is left to be spent


def test_cheap_is_not_the_luckiest_of_many_that_seem_to_have_lost_nothing_to_the_plain_router() -> None:
    """Against quality row by row it may well have lost what quality could not spare."""
    quality = FrontierPoint(weight=0.0, avg_cost=50.0, score=0.700, experts=(0,), lost=0.0, lost_plain=0.001)
    lucky = FrontierPoint(weight=0.0, avg_cost=40.0, score=0.700, experts=(0,), lost=0.0015, lost_plain=0.001)
    saving = FrontierPoint(weight=0.0, avg_cost=45.0, score=0.700, experts=(0,), lost=0.0004, lost_plain=0.001)
    assert policies_of([quality, lucky, saving], best_single=0.6)["cheap"] == 2


def test_where_cost_harms_foreign_prompts_it_counts_only_for_familiar_ones() -> None:
    def rows(familiarity: float, cheap_score: float) -> tuple[Assessment, np.ndarray]:
        found = Assessment(
            categories_BC=np.ones((500, 1), np.float32),
            scores_BM=np.tile(np.array([0.8, 0.79], np.float32), (500, 1)),
            leads_BM=np.zeros((500, 2), np.float32),
            familiarity_B=np.full(500, familiarity, np.float32) + np.linspace(0, 0.05, 500, dtype=np.float32),
        )
        return found, np.tile([0.8, cheap_score], (500, 1))

    known, scores = rows(0.9, 0.79)
    strange, harmed = rows(0.5, 0.1)  # the cheap expert is expected to do as well there, and does not
    foreign = [Foreign(found=strange, scores_BM=harmed, general=0)]
    points = frontier(known, scores, np.zeros(500, np.int64), np.array([10.0, 1.0]), 0, OPEN, 0.001, foreign)
    cheap = points[policies_of(points, 0.78)["cheap"]]
    assert cheap.avg_cost < 5.0
    assert cheap.cost_from > 0.55
    assert not next(point for point in points if point.weight == cheap.weight and point.cost_from == 0.0).harmless


def test_doubt_about_quality_lets_no_harm_of_cheap_pass() -> None:
    """On few foreign rows quality may have lost points for all that is known: who does lose some is no better for it."""

    def rows(num: int) -> Assessment:
        return Assessment(
            categories_BC=np.ones((num, 1), np.float32),
            scores_BM=np.tile(np.array([0.60, 0.61, 0.59], np.float32), (num, 1)),
            leads_BM=np.zeros((num, 3), np.float32),
            familiarity_B=np.full(num, 0.8, np.float32),
        )

    right = np.arange(200) % 2 == 0
    general, best = right, ~right  # as good on average, on other prompts
    cheap = right & (np.arange(200) % 25 != 0)  # four points worse, beyond doubt
    foreign = [Foreign(found=rows(200), scores_BM=np.stack([general, best, cheap], axis=1).astype(np.float64), general=0)]
    known = np.tile([0.60, 0.61, 0.59], (600, 1))
    points = frontier(rows(600), known, np.zeros(600, np.int64), np.array([10.0, 10.0, 1.0]), 0, OPEN, 0.0, foreign)
    saving = [point for point in points if point.avg_cost < 2.0]
    assert saving
    assert not any(point.harmless for point in saving)


def test_datasets_that_disagree_are_no_proof_that_the_next_one_takes_no_harm() -> None:
    """Two left-out datasets of three gain from the cheap expert and one loses: by rows surely a gain, by datasets a toss."""
    strange = Assessment(
        categories_BC=np.ones((300, 1), np.float32),
        scores_BM=np.tile(np.array([0.60, 0.59], np.float32), (300, 1)),
        leads_BM=np.zeros((300, 2), np.float32),
        familiarity_B=np.full(300, 0.8, np.float32),
    )
    known = np.tile([0.60, 0.59], (600, 1))
    twice = replace(
        strange,
        **{
            name: np.repeat(getattr(strange, name), 2, axis=0)
            for name in ("categories_BC", "scores_BM", "leads_BM", "familiarity_B")
        },
    )

    def harmless(cheap: tuple[float, ...]) -> bool:
        foreign = [Foreign(found=strange, scores_BM=np.tile([0.6, score], (300, 1)), general=0) for score in cheap]
        points = frontier(twice, known, np.zeros(600, np.int64), np.array([10.0, 1.0]), 0, OPEN, 0.0, foreign)
        return any(point.harmless for point in points if point.avg_cost < 2.0)

    assert harmless((0.7, 0.7, 0.65))
    assert not harmless((0.9, 0.9, 0.3))


def test_balanced_saves_too_where_cheap_saves_on_familiar_prompts_alone() -> None:
    half = np.arange(1000) % 2
    lead = np.where(half, 0.15, 0.002)  # of the dear expert; balanced may give up the small one
    scores = np.stack([np.full(1000, 0.8), 0.8 - lead], axis=1)
    known = Assessment(
        categories_BC=np.ones((1000, 1), np.float32),
        scores_BM=scores.astype(np.float32),
        leads_BM=np.zeros(scores.shape, np.float32),
        familiarity_B=np.linspace(0.3, 0.95, 1000, dtype=np.float32),
    )
    strange = Assessment(
        categories_BC=np.ones((500, 1), np.float32),
        # Harmed by a weight that gives up the large lead, by no lesser one.
        scores_BM=np.tile(np.array([0.8, 0.65], np.float32), (500, 1)),
        leads_BM=np.zeros((500, 2), np.float32),
        familiarity_B=np.full(500, 0.5, np.float32),
    )
    foreign = [Foreign(found=strange, scores_BM=np.tile([0.8, 0.1], (500, 1)), general=0)]
    points = frontier(known, scores, np.zeros(1000, np.int64), np.array([10.0, 1.0]), 0, OPEN, 0.001, foreign)
    quality, balanced, cheap = (points[point] for point in policies_of(points, 0.7).values())
    assert cheap.cost_from > 0.5
    assert cheap.avg_cost < balanced.avg_cost < quality.avg_cost == 10.0
    assert balanced.cost_from >= cheap.cost_from
    assert balanced.harmless
    assert balanced.score >= quality.score - 0.001


def test_balanced_gives_no_more_for_what_it_saves_than_cheap_does() -> None:
    def point(weight: float, cost: float, score: float) -> FrontierPoint:
        return FrontierPoint(weight=weight, avg_cost=cost, score=score, experts=(0,))

    points = [point(0.0, 50.0, 0.700), point(0.1, 48.0, 0.699), point(0.2, 47.0, 0.697), point(0.3, 30.0, 0.690)]
    assert policies_of(points, best_single=0.6) == {"quality": 0, "balanced": 1, "cheap": 3}


def test_balanced_saves_nothing_that_a_few_rows_speak_for() -> None:
    """A cheap expert that is as good on average but right on other prompts may as well be a point worse: 400 rows can't tell."""
    source = np.random.default_rng(5)

    def balanced(num: int, lead: float) -> FrontierPoint:
        scores = np.stack([source.random(num) < 0.5, source.random(num) < 0.5], axis=1).astype(np.float64)
        scores[:, 1] = scores[:, 0] - lead if lead else np.roll(scores[:, 0], 1)  # without a lead: the same mean
        known = Assessment(
            categories_BC=np.ones((num, 1), np.float32),
            scores_BM=np.tile(np.array([0.5005, 0.5], np.float32), (num, 1)),
            leads_BM=np.zeros((num, 2), np.float32),
            familiarity_B=np.ones(num, np.float32),
        )
        points = frontier(known, scores, np.zeros(num, np.int64), np.array([10.0, 1.0]), 0, OPEN, 0.0)
        return points[policies_of(points, 0.4)["balanced"]]

    assert balanced(400, 0.0).avg_cost == 10.0
    assert balanced(400, 0.0005).avg_cost == 1.0  # right on the same prompts: no doubt


def test_means_of_classes_that_differ_much_are_drawn_little() -> None:
    source = np.random.default_rng(0)
    label = np.repeat(np.arange(10), 50)
    apart = source.normal(np.repeat(np.linspace(-1, 1, 10), 50), 0.3)[:, None]
    alike = source.normal(0.0, 0.3, 500)[:, None]
    assert prior_rows(label, apart) < 1.0  # the true ratio of variances is .09 / .37
    assert prior_rows(label, alike) > 20.0


def test_score_heads_find_a_linear_score() -> None:
    source = np.random.default_rng(0)
    embedding = source.normal(size=(2000, 5)).astype(np.float32)
    scores = 0.5 + 0.1 * embedding[:, :2].astype(np.float64)
    head = fit_values(embedding, scores, 1.0)
    assert np.allclose(embedding @ head.weights_DC + head.bias_C, scores, atol=1e-3)


def test_steadying_shrinks_only_what_rewording_moves_and_keeps_the_mean_length() -> None:
    source = np.random.default_rng(0)
    plain = source.normal(size=(400, 6)).astype(np.float32)
    variants = np.repeat(plain[:, None], 3, axis=1)
    variants[:, :, 2] += source.normal(size=(400, 3))
    steady = steadying(plain, variants, 5.0)
    lengths = np.linalg.norm(steady, axis=0)
    assert (lengths[[0, 1, 3, 4, 5]] > 2.0 * lengths[2]).all()
    assert np.linalg.norm(plain @ steady) == pytest.approx(np.linalg.norm(plain), rel=1e-3)
    assert (steadying(plain, variants, 0.0) == np.eye(6)).all()
    assert (steadying(plain, variants[:, :0], 5.0) == np.eye(6)).all()


def test_a_head_learnt_after_steadying_changes_its_mind_less_often() -> None:
    source = np.random.default_rng(1)
    label = source.integers(0, 2, 600)
    plain = source.normal(size=(600, 4)).astype(np.float32)
    plain[:, :2] += label[:, None] - 0.5  # one of two equal signs stays under rewording, the other does not
    variants = np.repeat(plain[:, None], 2, axis=1)
    variants[:, :, 1] += source.normal(size=(600, 2)) * 2.0

    def flips(steadiness: float) -> float:
        steady = steadying(plain, variants, steadiness)
        head = fit_classes(plain @ steady, label, 2, 0.01, 150)
        said = (plain @ steady @ head.weights_DC + head.bias_C).argmax(axis=1)
        again = (variants[:, 0] @ steady @ head.weights_DC + head.bias_C).argmax(axis=1)
        return float((said != again).mean())

    assert flips(20.0) < 0.8 * flips(0.0)


def test_folds_are_of_near_equal_size_and_the_same_for_a_seed() -> None:
    fold = folds_of(103, 5, 1)
    assert sorted(np.bincount(fold)) == [20, 20, 21, 21, 21]
    assert (fold == folds_of(103, 5, 1)).all()


def test_labels_grow_from_seeds_only_where_neighbours_agree() -> None:
    near = [[1.0, 0.0]] * 6 + [[0.0, 1.0]] * 6
    embedding = np.array([*near, [0.7, 0.7]], np.float32)
    seeds = ["x", "x", "x", None, None, None, "y", "y", "y", None, None, None, None]
    assert grow(seeds, embedding)[:12] != [""] * 12


def test_partly_labelled_tables_are_grown() -> None:
    table = example_table()
    some = table.rows(range(len(table)))
    categories = tuple(c if i % 3 == 0 else None for i, c in enumerate(some.categories))
    partly = type(some)(
        experts=some.experts, prompts=some.prompts, datasets=some.datasets, categories=categories, scores=some.scores
    )
    prepared = prepare(partly, Options(recipe=Recipe(num_variants=1), embedder="lsa"), lambda _: None)
    found = label(partly, prepared.fast.embedding_BD[:, : prepared.fast.num_near], 0)
    assert found.how == "grown"
    given = np.array([found.categories[c] if c >= 0 else "" for c in found.category_B])
    right = given == np.array(table.categories)
    assert right[given != ""].mean() > 0.95


def test_judged_perturbations_repeat_for_a_seed_and_differ_from_training_variants() -> None:
    prompts = ["What is the capital of France?", "Write a function that adds two numbers."]
    for name in PERTURBATIONS:
        assert perturbed(prompts, name, 0) == perturbed(prompts, name, 0)
        assert perturbed(prompts, name, 0) != prompts
    variants = {v for seed in range(50) for v in training_variants(prompts[0], 6, random.Random(seed))}
    assert not variants & {perturbed(prompts, "polite wrapper", seed)[0] for seed in range(50)}


@pytest.mark.slow
def test_judging_beats_the_best_single_expert_and_the_gate_does_no_harm() -> None:
    recipe = Recipe(num_variants=1)
    prepared = prepare(example_table(), Options(recipe=recipe, embedder="lsa"), lambda _: None)
    judged = by_prompt(prepared, recipe, lambda _: None)
    gain = estimate(judged.verdict.score_B - judged.verdict.single_B, 0)
    assert gain.low > 0.15
    left = by_dataset(prepared, recipe, lambda _: None)
    assert left is not None
    assert estimate(left.score_B - left.single_B, 0).mean > 0.0


def test_of_a_table_of_one_dataset_categories_are_left_out_in_turn() -> None:
    table = example_table()
    alone = replace(table, datasets=("all",) * len(table))
    prepared = prepare(alone, Options(recipe=Recipe(num_variants=1), embedder="lsa"), lambda _: None)
    groups = left_out_groups(prepared)
    assert groups is not None
    assert (groups[0], set(groups[1].tolist())) == ("category", set(prepared.labels.categories))
    same = replace(alone, categories=("x",) * len(table))
    assert left_out_groups(prepare(same, Options(recipe=Recipe(num_variants=1), embedder="lsa"), lambda _: None)) is None
