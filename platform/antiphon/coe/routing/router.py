"""The router of one composition: judges prompts with the artifact, decides, remembers why (request speed, milliseconds at most).

Holds the artifact (replaced whole by ``swap``) and the last decisions; which expert a session had is the caller's to know. Safe
to call from several threads: judging touches nothing mutable, bookkeeping is under one lock. Must not know: HTTP, gRPC, where
the view comes from.
"""

from __future__ import annotations

import hashlib
import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from antiphon.coe.routing.artifact import Artifact, PolicyPoint
from antiphon.coe.routing.budget import DocumentBudget, document_budget, price_of
from antiphon.coe.routing.decision import EVERYONE_IDLE, Decision, DecisionId, Judgement, PolicyTerms, Question, View, decide
from antiphon.coe.routing.learning.log import append_feedback, read_feedback
from antiphon.coe.routing.learning.online import Feedback, OnlineLearner
from antiphon.core.document.coe.experts import ExpertSpec
from antiphon.core.document.composition import CompositionSpec, Policy, PolicySpec
from antiphon.core.errors import AlreadyRated, InvalidInput

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """A decision with all it was made from, so that it can be explained and replayed. The prompt itself is not kept."""

    decision_id: DecisionId
    decision: Decision
    question: Question  # without its prompt
    judgement: Judgement | None
    view: View
    sticky_expert: str | None
    artifact_digest: str
    decided_s: float  # wall clock
    took_s: float


def judge(artifact: Artifact, prompt: str, *, strictness: float, slow_path: bool) -> Judgement:
    """What the artifact says of a prompt; pure. ``strictness`` scales the gate's threshold (0 = never gated)."""
    embedding = artifact.embedding.encode(prompt)
    path, slow = artifact.fast, False
    threshold = path.gate.threshold * strictness
    probabilities, scores, leads, familiarity = path.quick.assess(embedding, threshold)
    if slow_path and artifact.slow is not None and artifact.encoder is not None and familiarity < threshold:
        sentence = artifact.encoder.encode(prompt)
        path, slow = artifact.slow, True
        threshold = path.gate.threshold * strictness
        probabilities, scores, leads, familiarity = path.quick.assess(np.concatenate([sentence, embedding]), threshold)
    confidence = max(probabilities)
    return Judgement(
        category=artifact.categories[probabilities.index(confidence)],
        confidence=confidence,
        familiarity=familiarity,
        gated=familiarity < threshold,
        slow=slow,
        probabilities=dict(zip(artifact.categories, probabilities, strict=True)),
        scores=dict(zip(artifact.expert_names, scores, strict=True)),
        leads=dict(zip(artifact.expert_names, leads, strict=True)),
    )


def policy_terms(
    artifact: Artifact | None,
    spec: CompositionSpec,
    policy: Policy,
    budget: DocumentBudget = DocumentBudget(),
    at_least: float | None = None,
) -> PolicyTerms:
    """A policy as cost per expert and the experts worth having, from the artifact's frontier and the document's costs.

    An expert costs by its active parameters or its price, whichever is the greater share of the largest; under a budget of
    price, by its price alone. ``at_least`` is a share of the best quality to keep at the least cost, instead of a policy. What the
    memory leaves out is not worth having under any policy.
    """
    names = [expert.name for expert in spec.experts]
    resident = frozenset(names) if budget.resident is None else budget.resident
    if artifact is None or not artifact.policies:
        return PolicyTerms(cost={}, experts=resident)
    prices = {expert.name: price_of(expert) for expert in spec.experts}
    dearest = max(prices.values()) or 1.0
    if policy == "budget" and budget.price_weight is not None:
        return PolicyTerms(
            cost={name: budget.price_weight * price / dearest for name, price in prices.items()}, experts=resident, leads=0.0
        )
    point = _point(artifact, spec, policy) if at_least is None else _cheapest(artifact, at_least)
    known = dict(zip(artifact.expert_names, artifact.costs, strict=True))
    costs = {e.name: e.active_params_b if e.active_params_b is not None else known.get(e.name, 1.0) for e in spec.experts}
    largest = max(costs.values())
    added = {expert.name for expert in artifact.experts if expert.added_from_probes}
    worth = {artifact.expert_names[m] for m in point.experts if artifact.allowed[m]} | added
    shares = {name: max(cost / largest, prices[name] / dearest) for name, cost in costs.items()}
    tie_weight = artifact.frontier[artifact.policies["quality"]].weight
    return PolicyTerms(
        cost={name: point.weight * share for name, share in shares.items()},
        experts=frozenset(worth & resident) or resident,
        cost_from=point.cost_from,
        leads=point.leads,
        tie_cost={name: tie_weight * share for name, share in shares.items()},
    )


def _cheapest(artifact: Artifact, at_least: float) -> PolicyPoint:
    """The cheapest point that keeps this share of the best score that training saw on rows it had not learnt from."""
    best = max(point.score for point in artifact.frontier)
    good = [point for point in artifact.frontier if point.score >= at_least * best]
    return min(good, key=lambda point: (point.avg_cost, -point.score))


def _point(artifact: Artifact, spec: CompositionSpec, policy: Policy) -> PolicyPoint:
    if policy == "at-least":
        share = spec.policy.at_least
        return artifact.frontier[artifact.policies["balanced"]] if share is None else _cheapest(artifact, share)
    if policy != "budget":
        return artifact.frontier[artifact.policies[policy]]
    limit = spec.policy.max_avg_active_params_b
    if limit is None:
        return artifact.frontier[artifact.policies["balanced"]]
    within = [point for point in artifact.frontier if point.avg_cost <= limit]
    if not within:
        return min(artifact.frontier, key=lambda point: point.avg_cost)
    return max(within, key=lambda point: point.score)


def spec_of(artifact: Artifact) -> CompositionSpec:
    """A document's part for an artifact alone, as ``coe route`` and judging use it: its experts, nothing else."""
    # Names of a score table are anything; what a document may be called is not checked here.
    experts = tuple(
        ExpertSpec.model_construct(name=e.name, deployment_ref=e.name, active_params_b=e.active_params_b) for e in artifact.experts
    )
    return CompositionSpec.model_construct(
        experts=experts, general=artifact.expert_names[artifact.general], policy=PolicySpec(name="quality")
    )


_NAMED_BY = 2000  # characters of a prompt that its decision's id is made from
_SAME_SCORE = 1e-6  # apart at most: gRPC has scores in 32 bits
_QUICK_CHARACTERS = 2000  # of a prompt that the fast path judges in well below 0.3 ms


class Router:
    """Routes the requests of one composition."""

    def __init__(
        self,
        spec: CompositionSpec,
        artifact: Artifact | None,
        *,
        replica: str = "",
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        """``artifact`` None = rules and the general expert only; ``replica`` sets this replica's decision ids apart. Where
        others may ask for a decision by its id, there is something random in it: else the id of a prompt could be worked out.

        Raises:
            InvalidInput: the document's experts and the artifact's don't fit.
        """
        self.spec = spec
        self._clock = clock
        self._wall_clock = wall_clock
        self._replica = replica
        self._lock = threading.Lock()
        self._records: OrderedDict[DecisionId, Record] = OrderedDict()
        self._feedback: dict[DecisionId, float] = {}
        self._num_decisions = 0
        self._learner = None if spec.learning is None else OnlineLearner(spec.learning)
        self._log = None if spec.learning is None or spec.learning.log is None else Path(spec.learning.log)
        if self._learner is not None and self._log is not None:
            for feedback in read_feedback(self._log):
                self._learner.learn(feedback)
        self._decider = _fitting(artifact, spec)  # replaced as one by swap

    @property
    def artifact(self) -> Artifact | None:
        """The artifact that decides now."""
        return self._decider.artifact

    @property
    def budget(self) -> DocumentBudget:
        """What the document's limits come to with it."""
        return self._decider.budget

    def swap(self, artifact: Artifact) -> None:
        """Decide with another artifact from the next request on; the old one goes on until then.

        Raises:
            InvalidInput: it doesn't fit the document; the old one stays.
        """
        self._decider = _fitting(artifact, self.spec)

    def is_quick(self, question: Question) -> bool:
        """Whether a decision takes well below a millisecond: nothing to judge, or a short prompt and the fast path alone."""
        artifact = self.artifact
        if artifact is None or question.expert is not None:
            return True
        slow = self.spec.router.slow_path == "auto" and artifact.slow is not None
        return not slow and len(question.prompt) <= _QUICK_CHARACTERS

    def route(self, question: Question, view: View = EVERYONE_IDLE, sticky_expert: str | None = None) -> Record:
        """Decide and remember.

        Raises:
            InvalidInput: what was asked for does not exist or can't be served by any expert.
            Unavailable: nobody who could serve it is healthy.
        """
        began = self._clock()
        decider = self._decider
        artifact, judgement = decider.artifact, None
        if artifact is not None and question.expert is None:
            gate = self.spec.gate
            judgement = judge(
                artifact,
                question.prompt,
                strictness=gate.strictness if gate.enabled else 0.0,
                slow_path=self.spec.router.slow_path == "auto",
            )
            if self._learner is not None:
                with self._lock:
                    judgement = self._learner.adjusted(judgement)
        terms = decider.terms(self.spec, question.policy or self.spec.policy.name)
        decision = decide(question, judgement, self.spec, terms, view, sticky_expert)
        return self._remember(question, judgement, view, sticky_expert, decision, began)

    def without_judgement(self, question: Question, view: View = EVERYONE_IDLE, sticky_expert: str | None = None) -> Record:
        """Decide without looking at the prompt: what a caller does whose router is out of time.

        Raises:
            InvalidInput: what was asked for does not exist or can't be served by any expert.
            Unavailable: nobody who could serve it is healthy.
        """
        began = self._clock()
        terms = PolicyTerms(cost={}, experts=frozenset(expert.name for expert in self.spec.experts))
        decision = decide(question, None, self.spec, terms, view, sticky_expert)
        return self._remember(question, None, view, sticky_expert, decision, began)

    def explain(self, decision_id: DecisionId) -> Record:
        """The record of a decision.

        Raises:
            InvalidInput: it is not (any more) among the records of this replica.
        """
        with self._lock:
            record = self._records.get(decision_id)
        if record is None:
            raise InvalidInput(f"there is no record of decision {decision_id!r}", "decision_id")
        return record

    def replay(self, decision_id: DecisionId, policy: Policy) -> Decision:
        """What the same request would have got under another policy: same judgement, same view of the experts.

        Raises:
            InvalidInput: there is no record of it.
        """
        record = self.explain(decision_id)
        question = replace(record.question, policy=policy)
        terms = self._decider.terms(self.spec, policy)
        return decide(question, record.judgement, self.spec, terms, record.view, record.sticky_expert)

    @property
    def learner(self) -> OnlineLearner | None:
        """What was learnt from feedback; None where the document learns nothing. To be read, not to be told."""
        return self._learner

    def feedback(self, decision_id: DecisionId, score: float, expert: str | None = None) -> None:
        """Note how good the answer was, 0..1, beside its decision, and learn from it where the document says so.

        ``expert`` is who answered; None = who was decided for. The same score again changes nothing: a client may try again.

        Raises:
            InvalidInput: the score is out of range or there is no record of the decision.
            AlreadyRated: the decision has another score.
        """
        if not 0.0 <= score <= 1.0:
            raise InvalidInput("score must be between 0 and 1", "score")
        record = self.explain(decision_id)
        with self._lock:
            noted = self._feedback.get(decision_id)
            if noted is None:
                self._feedback[decision_id] = score
                self._learn(record, score, record.decision.expert if expert is None else expert)
        if noted is not None and abs(noted - score) > _SAME_SCORE:
            raise AlreadyRated(f"decision {decision_id!r} has the score {noted:g} already, and keeps it", "score")

    def _learn(self, record: Record, score: float, expert: str) -> None:
        judgement = record.judgement
        if self._learner is None or judgement is None or expert not in judgement.scores:
            return
        expected = judgement.scores[expert] - judgement.learnt.get(expert, 0.0)
        feedback = Feedback(category=judgement.category, expert=expert, expected=expected, score=score)
        if self._learner.learn(feedback):
            _logger.warning(
                "scores drift from what artifact %s expects (alarm %d, after %d feedbacks): train it again on newer scores",
                record.artifact_digest,
                self._learner.num_alarms,
                self._learner.num_feedbacks,
            )
        if self._log is not None:
            try:
                append_feedback(self._log, feedback)
            except OSError as error:
                _logger.warning("feedback can't be kept in %s: %s", self._log, error)

    def records(self) -> Sequence[tuple[Record, float | None]]:
        """All records that are kept, oldest first, each with its feedback or None."""
        with self._lock:
            return [(record, self._feedback.get(key)) for key, record in self._records.items()]

    def _remember(
        self,
        question: Question,
        judgement: Judgement | None,
        view: View,
        sticky_expert: str | None,
        decision: Decision,
        began_s: float,
    ) -> Record:
        now_s = self._clock()
        with self._lock:
            self._num_decisions += 1
            record = Record(
                decision_id=_decision_id(self._replica, self._num_decisions, question),
                decision=decision,
                question=_without_prompt(question),
                judgement=judgement,
                view=view,
                sticky_expert=sticky_expert,
                artifact_digest="" if self.artifact is None else self.artifact.digest,
                decided_s=self._wall_clock(),
                took_s=now_s - began_s,
            )
            if self.spec.router.record_decisions:
                self._records[record.decision_id] = record
                while len(self._records) > self.spec.router.record_decisions:
                    old, _ = self._records.popitem(last=False)
                    self._feedback.pop(old, None)
        return record


def _without_prompt(question: Question) -> Question:
    """By hand: every decision needs it, and ``replace`` takes three times as long."""
    return Question(
        prompt="",
        session=question.session,
        expert=question.expert,
        category=question.category,
        policy=question.policy,
        language=question.language,
        headers=question.headers,
        context_tokens=question.context_tokens,
        modalities=question.modalities,
        tools=question.tools,
        allowed=question.allowed,
    )


def _decision_id(replica: str, number: int, question: Question) -> DecisionId:
    """The number alone sets a replica's decisions apart; the prompt's beginning sets those of nameless replicas apart."""
    content = f"{replica}\0{number}\0{question.session}\0{question.prompt[:_NAMED_BY]}".encode("utf-8", "surrogatepass")
    return DecisionId(f"rd-{number:x}-{hashlib.sha256(content).hexdigest()[:16]}")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Decider:
    """An artifact and what the document's limits and policies come to with it."""

    artifact: Artifact | None
    budget: DocumentBudget
    by_policy: dict[Policy, PolicyTerms] = field(default_factory=dict)  # filled when asked; always with the same values

    def terms(self, spec: CompositionSpec, policy: Policy) -> PolicyTerms:
        """The policy's terms, worked out once."""
        known = self.by_policy.get(policy)
        if known is None:
            known = self.by_policy[policy] = policy_terms(self.artifact, spec, policy, self.budget)
        return known


def _fitting(artifact: Artifact | None, spec: CompositionSpec) -> _Decider:
    if artifact is None:
        return _Decider(artifact=None, budget=DocumentBudget())
    known = set(artifact.expert_names)
    unknown = [expert.name for expert in spec.experts if expert.name not in known]
    if unknown:
        raise InvalidInput(
            f"the router artifact does not know expert {unknown[0]!r}; it knows {', '.join(artifact.expert_names)}",
            "spec.experts",
        )
    return _Decider(artifact=artifact, budget=document_budget(artifact, spec))
