"""Trains a router from a score table: embeddings, paths, policies, mapping (control speed, offline, minutes on one core).

``prepare`` makes everything that does not depend on which rows are learned from; judging prepares once and fits many times.
Must not know: documents, services, plots.
"""

from __future__ import annotations

import hashlib
import itertools
import random
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path as FilePath
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from antiphon.coe.routing.artifact import Artifact, ArtifactExpert, PolicyPoint, ServedPath, as_stored
from antiphon.coe.routing.assessment import Floats, Ints
from antiphon.coe.routing.assets import ENCODER, VOCABULARY, resolve
from antiphon.coe.routing.embedding import StaticEmbedding
from antiphon.coe.routing.encoder import SentenceEncoder
from antiphon.coe.routing.wordpiece import WordPiece
from antiphon.coe.training.data.augment import training_variants
from antiphon.coe.training.data.labels import Labels, label
from antiphon.coe.training.data.table import Duplicates, ScoreTable, drop_duplicates, filled, normalised
from antiphon.coe.training.encoders import static
from antiphon.coe.training.encoders.sentences import encode_sentences, served_encoder
from antiphon.coe.training.encoders.topics import presence
from antiphon.coe.training.encoders.words import known_frames, word_counts
from antiphon.coe.training.fit import Examples, Memo, Path, Recipe, fit_path
from antiphon.coe.training.frontier import FrontierPoint, policies_of
from antiphon.coe.training.mapping import Budget, Mapping, solve
from antiphon.core.errors import CheckpointInvalid, InvalidInput

SLOW_TOKENS = 64  # the slow path is trained at the length it is served at
MIN_ROWS = 20
_SLOW_VARIANTS = 3
_FEW_ROWS = 200  # below, categories have too few prompts each for means that can be told apart
_MANY_CONFLICTS = 0.02  # share of prompts

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What the caller of training chooses."""

    recipe: Recipe
    embedder: str = "auto"  # auto, minilm or lsa
    slow_path: bool = False
    budget: Budget = field(default_factory=Budget)


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A table with embeddings and labels."""

    table: ScoreTable
    duplicates: Duplicates
    num_missing: int  # scores that the table does not know
    embedder: str
    embedding: StaticEmbedding
    encoder: SentenceEncoder | None
    fast: Examples
    slow: Examples | None

    @property
    def labels(self) -> Labels:
        """Category and source labels of every row."""
        return self.fast.labels


def prepare(table: ScoreTable, options: Options, say: Say) -> Prepared:
    """Embeddings and labels of every row.

    Raises:
        InvalidInput: the table is too small.
        CheckpointInvalid: the chosen embedder's files can't be had.
    """
    table, duplicates = drop_duplicates(table)
    if len(table) < MIN_ROWS:
        raise InvalidInput(f"the table has {len(table)} different prompts; training needs at least {MIN_ROWS}", "table")
    recipe = options.recipe
    num_missing = int((~np.isfinite(table.scores)).sum())
    for warning in warnings_of(table, duplicates, num_missing):
        say(f"warning: {warning}")
    table = filled(table)
    with threadpool_limits(1):
        published = _published(options, say)
        encoder = None
        if published is not None:
            say("token vectors")
            embedding, embedder = static.from_encoder(*published), "minilm"
            encoder = _slow_encoder(*published, say) if options.slow_path else None
        else:
            embedding, embedder = static.from_prompts(table.prompts, recipe.seed), "lsa"
        embedding = replace(embedding, known_frames=known_frames(table.prompts))
        say(f"embedding {len(table)} prompts and {recipe.num_variants} variants of each")
        variants = _variants(table, recipe)
        plain_BD = embedding.encode_all(table.prompts)
        variants_BVD = np.stack([embedding.encode_all(texts) for texts in variants], axis=1)
        num_near = embedding.num_near
        labels = label(table, plain_BD[:, :num_near], recipe.seed)
        fast = Examples(
            embedding_BD=plain_BD,
            variants_BVD=variants_BVD,
            present_BW=presence(embedding, table.prompts),
            variants_present_VBW=tuple(presence(embedding, texts) for texts in variants),
            counts=word_counts(embedding, table.prompts),
            token_weight_W=static.courtesy(embedding.tokens),
            num_near=min(recipe.num_near, num_near),
            labels=labels,
            datasets=np.array(table.datasets),
            scores_BM=table.scores,
        )
        slow = None
        if encoder is not None:
            say(f"sentence embeddings of {len(table) * (1 + _SLOW_VARIANTS)} texts")
            slow = _slow_examples(table, variants, fast, encoder)
    return Prepared(
        table=table,
        duplicates=duplicates,
        num_missing=num_missing,
        embedder=embedder,
        embedding=embedding,
        encoder=encoder,
        fast=fast,
        slow=slow,
    )


def warnings_of(table: ScoreTable, duplicates: Duplicates, num_missing: int) -> list[str]:
    """What a person should know of a table before trusting a router of it."""
    found = []
    if len(table) < _FEW_ROWS:
        found.append(f"{len(table)} prompts are few: expect a router about as good as the best single expert, and wide intervals")
    if duplicates.num_conflicting > _MANY_CONFLICTS * len(table):
        found.append(
            f"{duplicates.num_conflicting} prompts stand in the table with different scores, which were averaged: "
            "no router can be better than the scores are steady"
        )
    if num_missing:
        found.append(
            f"{num_missing} of {table.scores.size} scores are not known; the expert's mean in the category stands for them"
        )
    return found


def slow_embedding(sentence_D: Floats, fast_D: Floats) -> Floats:
    """The slow path's embedding: the sentence's, then the fast path's."""
    return np.concatenate([sentence_D, fast_D], axis=-1)


def _published(options: Options, say: Say) -> tuple[FilePath, WordPiece] | None:
    """The published encoder and its vocabulary; None when the prompts alone must do."""
    if options.embedder not in ("auto", "minilm", "lsa"):
        raise InvalidInput(f"embedder must be auto, minilm or lsa, not {options.embedder!r}", "embedder")
    if options.embedder == "lsa":
        return None
    try:
        return resolve(ENCODER), WordPiece.from_file(resolve(VOCABULARY))
    except CheckpointInvalid as error:
        if options.embedder == "minilm":
            raise
        say(f"warning: {error}; training with token vectors from the prompts alone (embedder lsa), without a slow path")
        return None


def _slow_encoder(published: FilePath, tokens: WordPiece, say: Say) -> SentenceEncoder:
    try:
        return served_encoder(published, tokens, SLOW_TOKENS)
    except CheckpointInvalid as error:
        say(f"warning: {error}; the slow path serves the encoder as published, which takes three times as long and more memory")
        return SentenceEncoder(published, tokens, SLOW_TOKENS)


def _variants(table: ScoreTable, recipe: Recipe) -> list[list[str]]:
    """Variants of every prompt, by variant: each prompt's own seeded source, so that rows don't influence each other."""
    by_prompt = [
        training_variants(prompt, recipe.num_variants, random.Random(f"{recipe.seed}:{normalised(prompt)}"))
        for prompt in table.prompts
    ]
    return [[variants[v] for variants in by_prompt] for v in range(recipe.num_variants)]


def _slow_examples(table: ScoreTable, variants: list[list[str]], fast: Examples, encoder: SentenceEncoder) -> Examples:
    num, num_rows = min(_SLOW_VARIANTS, len(variants)), len(table)
    sentences = encode_sentences(encoder, [*table.prompts, *itertools.chain.from_iterable(variants[:num])])
    plain_BD = slow_embedding(sentences[:num_rows], fast.embedding_BD)
    more = [slow_embedding(sentences[(v + 1) * num_rows : (v + 2) * num_rows], fast.variants_BVD[:, v]) for v in range(num)]
    return replace(
        fast,
        embedding_BD=plain_BD,
        variants_BVD=np.stack(more, axis=1) if more else np.zeros((num_rows, 0, plain_BD.shape[1]), np.float32),
        num_near=sentences.shape[1],
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Router:
    """Both paths, fitted on the same rows, and what each policy came to."""

    fast: Path
    slow: Path | None
    policies: dict[str, int]  # policy → point of the fast path's frontier


@dataclass(slots=True)
class Memos:
    """Models already fitted, per path. Owned by one judging run."""

    fast: Memo
    slow: Memo

    @classmethod
    def empty(cls) -> Memos:
        """Nothing fitted yet."""
        return cls(fast=Memo(), slow=Memo())


def fit_router(prepared: Prepared, rows: Ints, recipe: Recipe, memos: Memos | None = None) -> Router:
    """Fit and tune both paths on ``rows`` alone."""
    costs_M = prepared.table.params_b
    memos = Memos.empty() if memos is None else memos
    with threadpool_limits(1):
        fast = fit_path(prepared.fast, rows, costs_M, recipe, memos.fast)
        slow = None if prepared.slow is None else fit_path(prepared.slow, rows, costs_M, recipe, memos.slow)
    best_single = float(prepared.table.scores[rows].mean(axis=0).max())
    return Router(fast=fast, slow=slow, policies=policies_of(fast.frontier, best_single))


def train(table: ScoreTable, options: Options, say: Say) -> tuple[Artifact, Prepared]:
    """Train on the whole table; the artifact's digest is empty until it is written.

    Raises:
        InvalidInput: the table is too small or the budget can't be kept.
        CheckpointInvalid: the chosen embedder's files can't be had.
    """
    prepared = prepare(table, options, say)
    say("fitting")
    recipe = options.recipe
    router = fit_router(prepared, np.arange(len(prepared.table)), recipe)
    mapping = _mapping(prepared, router, options.budget)
    return _artifact(prepared, router, mapping, options), prepared


def _mapping(prepared: Prepared, router: Router, budget: Budget) -> Mapping:
    labels = prepared.labels
    share_C = np.bincount(labels.category_B[labels.category_B >= 0], minlength=len(labels.categories)).astype(float)
    scores_CM = router.fast.fitted.category_scores_CM.astype(np.float64)
    if budget == Budget():
        # Who is never picked serves no category either.
        unpicked = sorted(set(range(scores_CM.shape[1])) - set(router.fast.frontier[router.policies["quality"]].experts))
        scores_CM[:, unpicked] = -1.0
    return solve(scores_CM, share_C, prepared.table.params_b, budget, general=router.fast.general)


def _artifact(prepared: Prepared, router: Router, mapping: Mapping, options: Options) -> Artifact:
    table, fast = prepared.table, router.fast
    means = table.scores.mean(axis=0)
    budgeted = options.budget != Budget()
    allowed = mapping.kept if budgeted else (True,) * len(table.experts)
    training: dict[str, Any] = {
        "recipe": asdict(options.recipe),
        "embedder": prepared.embedder,
        "slow_path": router.slow is not None,
        "budget": asdict(options.budget),
        "cost_unit": "1e9 active parameters" if table.has_params else "experts, each 1",
        "table": {"digest": table.digest(), "source": table.source, "num_prompts": len(table)},
        "datasets": sorted(set(table.datasets)),
        "duplicates": asdict(prepared.duplicates),
        "num_missing": prepared.num_missing,
        "labels": {"how": prepared.labels.how, "num_unlabelled": prepared.labels.num_unlabelled},
        "mapping": {"score": mapping.score, "avg_cost": mapping.avg_cost},
        "prompt_hashes": [prompt_hash(prompt) for prompt in table.prompts],
    }
    return Artifact(
        digest="",
        experts=tuple(
            ArtifactExpert(name=e.name, active_params_b=e.active_params_b, mean_score=float(means[m]))
            for m, e in enumerate(table.experts)
        ),
        categories=prepared.labels.categories,
        classes=prepared.labels.sources,
        general=fast.general,
        mapping=mapping.expert_of,
        allowed=allowed,
        costs=tuple(float(cost) for cost in table.params_b),
        policies=router.policies,
        frontier=tuple(_stored(point) for point in fast.frontier),
        embedding=replace(prepared.embedding, topics=fast.spaces.topics, words=fast.spaces.words),
        fast=as_stored(ServedPath.of(fast.fitted, fast.mix, fast.gate)),
        slow=None if router.slow is None else as_stored(ServedPath.of(router.slow.fitted, router.slow.mix, router.slow.gate)),
        encoder=prepared.encoder if router.slow is not None else None,
        training=training,
    )


def _stored(point: FrontierPoint) -> PolicyPoint:
    """Without what only training asks for."""
    return PolicyPoint(**{name: value for name, value in asdict(point).items() if name not in ("lost", "lost_plain")})


def prompt_hash(prompt: str) -> str:
    """A short hash of a normalised prompt: tells a seen prompt from a new one without keeping its text."""
    return hashlib.sha256(normalised(prompt).encode("utf-8", "surrogatepass")).hexdigest()[:12]


def recipe_of(artifact: Artifact) -> Recipe:
    """The recipe that an artifact was trained with, as far as this version has the same choices."""
    raw: dict[str, Any] = artifact.training["recipe"]
    known = {one.name for one in fields(Recipe)}
    stored: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in raw.items() if k in known}
    return Recipe(**stored)
