"""A new expert joins a trained router from a few scored probes; nothing is fitted again (control speed, offline).

Its mean score in each category and class is estimated from the probes that the router itself puts there, drawn towards its mean
and lowered by a standard error: an expert that few probes speak for is asked where it is surely better. What it brings is
measured on probes that were left out of the estimate; one that would make things worse is refused. Must not know: where probes
come from.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from antiphon.coe.routing.artifact import Artifact, ArtifactExpert, ServedPath
from antiphon.coe.routing.assessment import Floats, Ints, assess, class_probabilities
from antiphon.coe.training.data.table import ScoreTable
from antiphon.coe.training.heads import fit_values, prior_rows, shrunken_means
from antiphon.core.errors import InvalidInput

Doubles = npt.NDArray[np.float64]

MIN_PROBES = 20
_NUM_FOLDS = 5
_SURE = 1.96  # standard errors


@dataclass(frozen=True, slots=True, kw_only=True)
class Joined:
    """The router with the new expert, and what that is worth by the probes, with a 95 % interval."""

    artifact: Artifact
    share: float  # of the probes that the new expert would be asked
    gain: float  # mean score per probe, against what the router expects of its other experts there
    low: float
    high: float


def join_expert(artifact: Artifact, probes: ScoreTable) -> Joined:
    """The artifact with the probes' one expert added.

    Raises:
        InvalidInput: the probes score more than one expert or one that is known, or are too few, or say that the router would get
            worse.
    """
    if len(probes.experts) != 1:
        raise InvalidInput(f"probes score one new expert, not {len(probes.experts)}", "probes")
    expert = probes.experts[0]
    if expert.name in artifact.expert_names:
        raise InvalidInput(f"the router already knows expert {expert.name!r}", "probes")
    probes = probes.rows(probes.complete)
    if len(probes) < MIN_PROBES:
        raise InvalidInput(f"{len(probes)} probes with a score are too few; at least {MIN_PROBES} are needed", "probes")
    score_B = probes.scores[:, 0]
    fast_BD = artifact.embedding.encode_all(probes.prompts)
    slow = None
    if artifact.slow is not None and artifact.encoder is not None:
        sentences = np.stack([artifact.encoder.encode(prompt) for prompt in probes.prompts])
        slow = _joined(artifact.slow, np.concatenate([sentences, fast_BD], axis=1), score_B)
    known = [e.active_params_b for e in artifact.experts]
    cost = expert.active_params_b if expert.active_params_b is not None and None not in known else 1.0
    gain_B, asked_B = _rehearsed(artifact.fast, fast_BD, score_B)
    gain, error = float(gain_B.mean()), float(gain_B.std(ddof=1) / np.sqrt(len(gain_B)))
    if gain < 0.0:
        raise InvalidInput(
            f"with expert {expert.name!r} the router would score {-gain:.3f} less (± {_SURE * error:.3f}) by these {len(probes)} "
            "probes; it is not added. Score more probes, 20 to 50 per category",
            "probes",
        )
    joined = replace(
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
        fast=_joined(artifact.fast, fast_BD, score_B),
        slow=slow,
    )
    share = float(asked_B.mean())
    return Joined(artifact=joined, share=share, gain=gain, low=gain - _SURE * error, high=gain + _SURE * error)


def _rehearsed(path: ServedPath, embedding_BD: Floats, score_B: Doubles) -> tuple[Doubles, Doubles]:
    """For each probe, learning from the others alone: the gain of asking the new expert where it is picked, and whether it is."""
    fold = np.random.default_rng(0).permutation(len(score_B)) % _NUM_FOLDS
    gain_B, asked_B = np.zeros(len(score_B)), np.zeros(len(score_B))
    for f in range(_NUM_FOLDS):
        out = fold == f
        trial = _joined(path, embedding_BD[~out], score_B[~out])
        found = assess(trial.fitted.raw(embedding_BD[out]), trial.fitted, trial.mix, trial.gate)
        net_BM = found.net()
        others_B = np.take_along_axis(found.scores_BM, net_BM[:, :-1].argmax(axis=1)[:, None], axis=1)[:, 0]
        asked_B[out] = net_BM[:, -1] > net_BM[:, :-1].max(axis=1)
        gain_B[out] = asked_B[out] * (score_B[out] - others_B)
    return gain_B, asked_B


def _joined(path: ServedPath, embedding_BD: Floats, score_B: Doubles) -> ServedPath:
    """The path with one more column everywhere; the new expert's score heads say what the means of the classes say."""
    fitted = path.fitted
    F, mean = len(fitted.category_F), float(score_B.mean())
    class_B: Ints = fitted.raw(embedding_BD).logits_BF.argmax(axis=1)
    category_B = fitted.category_F[class_B]
    num_prior = max(1.0, prior_rows(category_B, score_B[:, None]))
    num_categories = len(fitted.category_scores_CM)
    of_category = shrunken_means(category_B, score_B[:, None], num_categories, np.array([mean]), num_prior)[:, 0]
    of_class = np.array(
        [
            (score_B[class_B == f].sum() + num_prior * of_category[fitted.category_F[f]]) / ((class_B == f).sum() + num_prior)
            for f in range(F)
        ],
        np.float32,
    )
    # Noise within categories; one probe that scored half stands for what none has shown.
    rest_B = np.append(score_B - of_category[category_B], 0.5)
    spread = float(np.sqrt((rest_B**2).mean()))
    of_category = of_category - spread / np.sqrt(np.bincount(category_B, minlength=num_categories) + num_prior)
    of_class -= (spread / np.sqrt(np.bincount(class_B, minlength=F) + num_prior)).astype(np.float32)
    of_category = of_category.astype(np.float32)
    end = F + len(fitted.mean_M)  # the new expert's column comes behind those of the other experts
    heads_DH = np.insert(fitted.heads_DH, end, np.float32(0.0), axis=1)
    bias_H = np.insert(fitted.bias_H, end, np.float32(0.0))
    if path.mix.value_share:
        # No head can be learnt from so few: the nearest linear one to what the classes' means say of the landmarks.
        known = fitted.raw(fitted.landmarks_ND)
        expected_N = class_probabilities(known, fitted.temperature, path.mix.word_share) @ of_class
        head = fit_values(fitted.landmarks_ND, expected_N[:, None].astype(np.float64), 1.0)
        heads_DH[:, end], bias_H[end] = head.weights_DC[:, 0], head.bias_C[0]
    joined = replace(
        fitted,
        heads_DH=heads_DH,
        bias_H=bias_H,
        class_scores_FM=np.concatenate([fitted.class_scores_FM, of_class[:, None]], axis=1),
        category_scores_CM=np.concatenate([fitted.category_scores_CM, of_category[:, None]], axis=1),
        # What so few probes say of a class alone is no mean: the plain router is told what the others are.
        plain_scores_FM=np.concatenate([fitted.plain_scores_FM, of_class[:, None]], axis=1),
        mean_M=np.append(fitted.mean_M, np.float32(mean)),
    )
    return ServedPath.of(joined, path.mix, path.gate)
