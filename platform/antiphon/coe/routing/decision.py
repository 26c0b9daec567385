"""Which expert serves a request, and why: the router's decision as one pure function (request speed).

    explicit expert ─► rules ─► hard filters ─► assessment ─► gate ─► score − cost − wait ─► stickiness ─► pick and runner-up

Same question, same view of the experts, same settings: same decision, on every replica. Nothing here looks at a clock, draws a
number or raises for what a client sent. Must not know: HTTP, gRPC, where the view comes from.
"""

from __future__ import annotations

import enum
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import NamedTuple, NewType

from antiphon.core.document.coe.experts import ExpertSpec
from antiphon.core.document.composition import CompositionSpec, Policy, RuleMatch
from antiphon.core.errors import InvalidInput, Unavailable

DecisionId = NewType("DecisionId", str)


class Reason(enum.Enum):
    """Why an expert was picked."""

    EXPLICIT = "explicit"  # the request named it
    RULE = "rule"  # a rule of the document
    CATEGORY = "category"  # the document maps the category
    SCORE = "score"  # best score after cost and wait
    STICKY = "sticky"  # the session's expert is good enough
    UNCERTAIN = "uncertain"  # the gate closed: general expert
    ONLY_CHOICE = "only-choice"  # one expert passes the filters
    NO_ROUTER = "no-router"  # no artifact, or the decision took too long: general expert
    FALLBACK = "fallback"  # the intended expert can't serve now


class Block(enum.Enum):
    """Why an expert can't serve a request."""

    CONTEXT = "context"
    MODALITY = "modality"
    TOOLS = "tools"
    UNHEALTHY = "unhealthy"
    NOT_ALLOWED = "not-allowed"


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """What is known of a request when it is routed. ``headers`` have lower-case names."""

    prompt: str
    session: str = ""
    expert: str | None = None  # asked for by name
    category: str | None = None  # said by the caller; the rules look at it
    policy: Policy | None = None  # None = the document's
    language: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    context_tokens: int = 0  # prompt plus output; 0 = not known
    modalities: tuple[str, ...] = ("text",)
    tools: bool = False
    allowed: frozenset[str] | None = None  # experts the caller may reach; None = all


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertState:
    """One expert, as the whole cluster sees it."""

    healthy: bool = True
    resident: bool = True
    num_waiting: int = 0
    expected_wait_s: float = 0.0  # until a request sent now starts, queueing only
    load_s: float = 0.0  # to become resident when it isn't


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """State of all experts at one moment; ``version`` grows with every change, so that a replay can name what was seen."""

    experts: Mapping[str, ExpertState]
    version: int = 0

    def of(self, name: str) -> ExpertState:
        """The expert's state; one that nobody has reported on counts as healthy and idle."""
        return self.experts.get(name, _UNREPORTED)


_UNREPORTED = ExpertState()
_JUST = 1e-5  # of a score: more than ties are broken by
EVERYONE_IDLE = View(experts={})


@dataclass(frozen=True, slots=True, kw_only=True)
class Judgement:
    """What the artifact says about one prompt, by expert name; the ground of a decision and of its replays."""

    category: str
    confidence: float  # calibrated p(category)
    familiarity: float
    gated: bool  # below the gate's threshold
    slow: bool  # the sentence encoder was asked
    probabilities: Mapping[str, float]
    scores: Mapping[str, float]  # expected score per expert, before cost
    learnt: Mapping[str, float] = field(default_factory=dict)  # of these, what feedback has added
    leads: Mapping[str, float] = field(default_factory=dict)  # score by which an expert must be ahead of who is asked for less


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyTerms:
    """A policy, resolved: what each expert costs in score, and which experts are worth having under it."""

    cost: Mapping[str, float]
    experts: frozenset[str]
    cost_from: float = 0.0  # familiarity from which cost counts; what is less familiar goes to who is expected to be best
    tie_cost: Mapping[str, float] = field(default_factory=dict)  # what costs below: no more than parts equals
    leads: float = 1.0  # share that counts of the leads that the judgement asks for


class Candidate(NamedTuple):
    """One expert in a decision. ``total`` = score − cost − wait − lead; None where a block keeps it out.

    A named tuple, because every decision makes one per expert: a frozen dataclass takes twice as long.
    """

    expert: str
    score: float
    cost: float
    wait: float
    total: float | None
    block: Block | None = None
    lead: float = 0.0  # by which it must be ahead of experts that less is asked of


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """What was chosen and why. ``detail`` is the reason in a sentence; ``alternatives`` are the next ones to try, in order."""

    expert: str
    reason: Reason
    detail: str
    policy: Policy
    runner_up: str | None
    alternatives: tuple[str, ...]
    category: str = ""
    confidence: float = 0.0
    familiarity: float = 0.0
    slow: bool = False
    candidates: tuple[Candidate, ...] = ()


def decide(
    question: Question,
    judgement: Judgement | None,
    spec: CompositionSpec,
    terms: PolicyTerms,
    view: View,
    sticky_expert: str | None = None,
) -> Decision:
    """Pick an expert; ``judgement`` is None when there is no artifact or no time, ``sticky_expert`` is the session's last one.

    Raises:
        InvalidInput: the request names an expert that does not exist or may not be reached, or no expert could ever serve it.
        Unavailable: every expert that could serve it is unhealthy.
    """
    policy = question.policy if question.policy is not None else spec.policy.name
    candidates = _candidates(question, spec, judgement, terms, view)
    blocks = {candidate.expert: candidate.block for candidate in candidates}
    able = {name: None for name, block in blocks.items() if block is None}  # in order, and quick to be asked
    if question.expert is not None and (question.expert not in blocks or blocks[question.expert] is Block.NOT_ALLOWED):
        # A hidden expert looks like one that does not exist.
        raise InvalidInput(f"there is no expert {question.expert!r} here", "expert")
    if not able:
        _refuse(blocks)
    expert, reason, detail = _chosen(question, judgement, spec, terms, candidates, blocks, sticky_expert, able, view)
    order = _order(expert, candidates, spec, able)
    return Decision(
        expert=expert,
        reason=reason,
        detail=detail,
        policy=policy,
        runner_up=order[0] if order else None,
        alternatives=order,
        category="" if judgement is None else judgement.category,
        confidence=0.0 if judgement is None else judgement.confidence,
        familiarity=0.0 if judgement is None else judgement.familiarity,
        slow=judgement is not None and judgement.slow,
        candidates=candidates,
    )


def _block(expert: ExpertSpec, question: Question, state: ExpertState) -> Block | None:
    if question.allowed is not None and expert.name not in question.allowed:
        return Block.NOT_ALLOWED
    if question.context_tokens and expert.context_tokens is not None and question.context_tokens > expert.context_tokens:
        return Block.CONTEXT
    if question.modalities != expert.modalities and not set(question.modalities) <= set(expert.modalities):
        return Block.MODALITY
    if question.tools and not expert.tools:
        return Block.TOOLS
    return None if state.healthy else Block.UNHEALTHY


def _refuse(blocks: Mapping[str, Block | None]) -> None:
    if Block.UNHEALTHY in blocks.values():
        raise Unavailable("no expert that could serve the request is healthy")
    if all(block is Block.NOT_ALLOWED for block in blocks.values()):
        raise InvalidInput("none of the experts may be reached by this caller", "model")
    found = ", ".join(sorted({block.value for block in blocks.values() if block not in (None, Block.NOT_ALLOWED)}))
    raise InvalidInput(f"no expert can serve this request ({found})", "messages")


def _candidates(
    question: Question, spec: CompositionSpec, judgement: Judgement | None, terms: PolicyTerms, view: View
) -> tuple[Candidate, ...]:
    found = []
    scores: Mapping[str, float] = {} if judgement is None else judgement.scores
    familiar = judgement is None or judgement.familiarity >= terms.cost_from
    costs, states, wait_weight = terms.cost if familiar else terms.tie_cost, view.experts, spec.policy.wait_weight
    leads = {} if judgement is None or not terms.leads else _leads(judgement, terms, costs)
    score_of, cost_of, lead_of, state_of = scores.get, costs.get, leads.get, states.get
    for expert in spec.experts:
        name = expert.name
        state = state_of(name, _UNREPORTED)
        block = _block(expert, question, state)
        score = score_of(name, 0.0)
        cost = cost_of(name, 0.0)
        wait = 0.0
        if state is not _UNREPORTED:
            wait = wait_weight * (state.expected_wait_s + (0.0 if state.resident else state.load_s))
        lead = lead_of(name, 0.0)
        found.append(Candidate(name, score, cost, wait, score - cost - wait - lead if block is None else None, block, lead))
    return tuple(found)


def _leads(judgement: Judgement, terms: PolicyTerms, costs: Mapping[str, float]) -> Mapping[str, float]:
    """What is asked of each expert, no more than sets it just behind the best one.

    A lead is to outweigh what the artifact expects, whatever that is, and nothing else: who waits long, is not there or has had
    worse feedback than others makes way for the next.
    """
    if not any(judgement.leads.values()):
        return {}
    known, learnt, share, cost_of, lead_of = terms.experts, judgement.learnt, terms.leads, costs.get, judgement.leads.get
    after = {name: score - cost_of(name, 0.0) for name, score in judgement.scores.items()}
    for name, shift in learnt.items():
        if name in after:
            after[name] -= shift
    best = max([after[name] - share * lead_of(name, 0.0) for name in known if name in after], default=0.0)
    leads = {}
    for name, total in after.items():
        lead, behind = share * lead_of(name, 0.0), total - best + _JUST
        if lead > 0.0 and behind > 0.0:
            leads[name] = lead if lead < behind else behind
    return leads


def _chosen(
    question: Question,
    judgement: Judgement | None,
    spec: CompositionSpec,
    terms: PolicyTerms,
    candidates: Sequence[Candidate],
    blocks: Mapping[str, Block | None],
    sticky_expert: str | None,
    able: Collection[str],
    view: View,
) -> tuple[str, Reason, str]:
    """The expert, the reason and its sentence."""
    if question.expert is not None:
        if blocks[question.expert] is None:
            return question.expert, Reason.EXPLICIT, "the request names this expert"
        return _instead(question.expert, blocks, spec, candidates, able)
    for rule in spec.rules:
        if _matches(rule.when, question) and blocks[rule.expert] is None:
            return rule.expert, Reason.RULE, f"rule {rule.name}"
    if len(able) == 1:
        return next(iter(able)), Reason.ONLY_CHOICE, "no other expert can serve this request"
    if judgement is None:
        if blocks[spec.general] is None:
            return spec.general, Reason.NO_ROUTER, "without a judgement of the prompt the general expert serves"
        return _instead(spec.general, blocks, spec, candidates, able)
    for category in spec.categories:
        if category.name == judgement.category and category.expert is not None and not judgement.gated:
            if blocks[category.expert] is None:
                return category.expert, Reason.CATEGORY, f"category {category.name} is mapped to this expert"
            return _instead(category.expert, blocks, spec, candidates, able)
    if judgement.gated:
        if blocks[spec.general] is None:
            detail = f"uncertain: familiarity {judgement.familiarity:.2f}, {judgement.category} at {judgement.confidence:.2f}"
            return spec.general, Reason.UNCERTAIN, detail
        return _instead(spec.general, blocks, spec, candidates, able)
    best = _best(candidates, terms)
    if sticky_expert is not None and spec.stickiness.enabled and sticky_expert != best.expert:
        stay = next((c for c in candidates if c.expert == sticky_expert and c.total is not None), None)
        if stay is not None and _total(best) - _total(stay) <= spec.stickiness.margin:
            return stay.expert, Reason.STICKY, f"the session's expert is within {spec.stickiness.margin:g} of {best.expert}"
    return best.expert, Reason.SCORE, f"best for {judgement.category} after cost and wait"


_TOTAL = attrgetter("total")  # of candidates that have one


def _total(candidate: Candidate) -> float:
    assert candidate.total is not None  # callers keep blocked candidates out
    return candidate.total


def _best(candidates: Sequence[Candidate], terms: PolicyTerms) -> Candidate:
    """The highest total among the policy's experts, or among all when none of them can serve; the earlier on a tie."""
    open_ones = [c for c in candidates if c.total is not None]
    preferred = [c for c in open_ones if c.expert in terms.experts] or open_ones
    return max(preferred, key=_TOTAL)


def _instead(
    wanted: str,
    blocks: Mapping[str, Block | None],
    spec: CompositionSpec,
    candidates: Sequence[Candidate],
    able: Collection[str],
) -> tuple[str, Reason, str]:
    block = blocks[wanted]
    why = "unavailable" if block is None else block.value
    return _order(wanted, candidates, spec, able)[0], Reason.FALLBACK, f"{wanted} can't serve this request ({why})"


def _order(chosen: str, candidates: Sequence[Candidate], spec: CompositionSpec, able: Collection[str]) -> tuple[str, ...]:
    """Experts to try after ``chosen``: the document's fallbacks, then the runner-up, then the general expert, then the rest."""
    by_total = [c.expert for c in sorted([c for c in candidates if c.total is not None], key=_TOTAL, reverse=True)]
    runner_up = [name for name in by_total[:2] if name != chosen][:1]
    wanted = [*spec.fallbacks, *runner_up, spec.general, *by_total]
    return tuple(dict.fromkeys(name for name in wanted if name in able and name != chosen))


def _matches(when: RuleMatch, question: Question) -> bool:
    if when.category is not None and when.category != question.category:
        return False
    if when.header is not None:
        present = question.headers.get(when.header)
        if present is None or (when.value is not None and present != when.value):
            return False
    if when.language is not None and when.language != question.language:
        return False
    if when.min_context_tokens is not None and question.context_tokens < when.min_context_tokens:
        return False
    return when.max_context_tokens is None or question.context_tokens <= when.max_context_tokens
