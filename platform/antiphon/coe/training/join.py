"""A new expert joins a trained router from a few scored probes; nothing is fitted again (control speed, offline).

Its mean score in each category and source is estimated from the probes that the router itself puts there, drawn towards its
mean; landmarks take the mean of their category. Must not know: where probes come from.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt

from antiphon.coe.routing.artifact import Artifact, ArtifactExpert, ServedPath
from antiphon.coe.routing.assessment import Floats, Ints
from antiphon.coe.training.table import ScoreTable
from antiphon.core.errors import InvalidInput

Doubles = npt.NDArray[np.float64]

MIN_PROBES = 20


def join_expert(artifact: Artifact, probes: ScoreTable) -> Artifact:
    """The artifact with the probes' one expert added.

    Raises:
        InvalidInput: the probes score more than one expert or one that is known, or are too few.
    """
    if len(probes.experts) != 1:
        raise InvalidInput(f"probes score one new expert, not {len(probes.experts)}", "probes")
    expert = probes.experts[0]
    if expert.name in artifact.expert_names:
        raise InvalidInput(f"the router already knows expert {expert.name!r}", "probes")
    if len(probes) < MIN_PROBES:
        raise InvalidInput(f"{len(probes)} probes are too few; at least {MIN_PROBES} are needed", "probes")
    score_B = probes.scores[:, 0]
    fast_BD = artifact.embedding.encode_all(probes.prompts)
    prior_rows = float(artifact.training["recipe"]["prior_rows"])
    slow = None
    if artifact.slow is not None and artifact.encoder is not None:
        sentences = np.stack([artifact.encoder.encode(prompt) for prompt in probes.prompts])
        slow = _joined(artifact.slow, np.concatenate([sentences, fast_BD], axis=1), score_B, prior_rows)
    known = [e.active_params_b for e in artifact.experts]
    cost = expert.active_params_b if expert.active_params_b is not None and None not in known else 1.0
    return replace(
        artifact,
        digest="",
        experts=(
            *artifact.experts,
            ArtifactExpert(
                name=expert.name,
                active_params_b=expert.active_params_b,
                mean_score=float(score_B.mean()),
                added_from_probes=len(probes),
            ),
        ),
        costs=(*artifact.costs, float(cost)),
        allowed=(*artifact.allowed, True),
        fast=_joined(artifact.fast, fast_BD, score_B, prior_rows),
        slow=slow,
    )


def _joined(path: ServedPath, embedding_BD: Floats, score_B: Doubles, prior_rows: float) -> ServedPath:
    fitted = path.fitted
    raw = fitted.raw(embedding_BD)
    coarse = _column(raw.coarse_BC.argmax(axis=1), score_B, len(fitted.coarse.bias_C), prior_rows, float(score_B.mean()))
    in_category = coarse[_category_of_sources(path)]
    fine_B: Ints = raw.fine_BF.argmax(axis=1)
    fine = np.array(
        [
            _column(np.where(fine_B == f, 0, 1), score_B, 1, prior_rows, float(in_category[f]))[0]
            for f in range(len(fitted.fine.bias_C))
        ],
        np.float32,
    )
    marks = fitted.landmarks
    near = coarse[marks.category_N][:, None].astype(np.float32)
    return replace(
        path,
        fitted=replace(
            fitted,
            coarse_scores_CM=np.concatenate([fitted.coarse_scores_CM, coarse[:, None]], axis=1),
            fine_scores_FM=np.concatenate([fitted.fine_scores_FM, fine[:, None]], axis=1),
            landmarks=replace(marks, scores_NM=np.concatenate([marks.scores_NM, near], axis=1)),
        ),
    )


def _column(label_B: Ints, score_B: Doubles, num_classes: int, prior_rows: float, prior: float) -> Floats:
    means = [
        (score_B[label_B == c].sum() + prior_rows * prior) / (int((label_B == c).sum()) + prior_rows) for c in range(num_classes)
    ]
    return np.array(means, np.float32)


def _category_of_sources(path: ServedPath) -> Ints:
    """The category of each source: the one whose landmarks the fine head most often puts there."""
    marks = path.fitted.landmarks
    head = path.fitted.fine.weights_DC[: marks.embedding_ND.shape[1]]
    source_N = (marks.embedding_ND @ head + path.fitted.fine.bias_C).argmax(axis=1)
    num_sources, num_categories = len(path.fitted.fine.bias_C), len(path.fitted.coarse.bias_C)
    counts = np.zeros((num_sources, num_categories))
    np.add.at(counts, (source_N, marks.category_N), 1)
    result: Ints = counts.argmax(axis=1)
    return result
