"""The composition document, ``CompositionOfExperts`` (serving.antiphon.dev/v1alpha1), as one typed model (control speed).

Several whole models behind one name, ``coe/<metadata.name>``; a router picks one per request. Field names are camelCase in
documents and snake_case here; unknown keys are refused. Must not know: how a router decides, or any transport.
"""

from __future__ import annotations

from typing import Literal
from urllib.parse import unquote

from pydantic import Field, field_validator, model_validator

from antiphon.core.document.coe.combining import CombineSpec
from antiphon.core.document.coe.experts import ExpertSpec, Name, SecretKeyRef
from antiphon.core.document.part import HeaderValue, Line, Metadata, Model, Prose, as_tuple
from antiphon.core.document.pools import Quantity, Resources, parse_quantity
from antiphon.core.errors import InvalidInput

Policy = Literal["quality", "balanced", "cheap", "budget", "at-least"]
POLICIES: tuple[Policy, ...] = ("quality", "balanced", "cheap", "budget", "at-least")


class CategorySpec(Model):
    """A class of requests. Categories of the artifact that are not listed keep the artifact's mapping."""

    name: Line = Field(description="Name of the category, as in the artifact.", min_length=1, max_length=128)
    description: Prose = Field(default="", description="What belongs to it, for people.", max_length=1024)
    expert: Name | None = Field(default=None, description="The expert that serves it always; None = the router weighs.")


class ArtifactRef(Model):
    """Where the trained router is."""

    uri: Line = Field(description="Directory path, file:// or pvc://claim/path.", min_length=1, max_length=1024)
    digest: str | None = Field(
        default=None, pattern=r"^sha256:[0-9a-f]{64}$", description="Digest that it must have; None = not checked."
    )

    @field_validator("uri")
    @classmethod
    def _stays_in_its_claim(cls, uri: str) -> str:
        if uri.startswith("pvc://") and ".." in unquote(uri).split("/"):
            raise ValueError("must not leave its claim by ..")
        return uri


class RouterSpec(Model):
    """The router's own pool and limits."""

    artifact: ArtifactRef | None = Field(default=None, description="The trained router; None = rules, then the general expert.")
    replicas: int = Field(default=1, ge=1, le=1000, description="Router replicas; they are stateless.")
    resources: Resources = Field(default_factory=Resources, description="What one replica asks of its machine.")
    slow_path: Literal["auto", "never"] = Field(
        default="auto", description="Ask the sentence encoder when the fast path is unsure (auto), or never."
    )
    timeout_s: float = Field(default=0.25, gt=0, le=10, description="A decision that takes longer goes to the general expert.")
    api_keys_secret: SecretKeyRef | None = Field(
        default=None,
        description="Kubernetes: secret with the API keys that the composition's doors accept, separated by commas; None = open.",
    )
    lends_expert_keys: bool = Field(
        default=False,
        description="Whether who needs no key here may use experts with keys that the router holds; False = it does not start so.",
    )
    record_decisions: int = Field(default=10_000, ge=0, le=10_000_000, description="Decisions kept for Explain, per replica.")


class PolicySpec(Model):
    """What to weigh against quality. ``coe/<name>:<policy>`` overrides ``name`` for one request."""

    name: Policy = Field(default="balanced", description="The default policy.")
    max_avg_active_params_b: float | None = Field(
        default=None, gt=0, le=100_000, description="budget: average active parameters, in 1e9; None = not limited."
    )
    max_avg_cost: float | None = Field(
        default=None,
        gt=0,
        le=1e6,
        description="budget: average price per million tokens, prompt and output in equal parts; None = not limited.",
    )
    at_least: float | None = Field(
        default=None, gt=0, le=1, description="at-least: share of the best quality to keep at the least cost; None = not said."
    )
    max_memory: Quantity | None = Field(default=None, description="Memory for all resident experts; None = not limited.")
    wait_weight: float = Field(
        default=0.002, ge=0, le=1, description="Score given up per second of expected wait or expert switch."
    )

    @model_validator(mode="after")
    def _budget_is_given(self) -> PolicySpec:
        given = self.max_avg_active_params_b is not None or self.max_avg_cost is not None
        if self.name == "budget" and not given:
            raise ValueError("name: policy budget needs maxAvgActiveParamsB or maxAvgCost")
        if self.name == "at-least" and self.at_least is None:
            raise ValueError("name: policy at-least needs atLeast")
        if self.max_avg_active_params_b is not None and self.max_avg_cost is not None:
            raise ValueError("maxAvgCost: give maxAvgActiveParamsB or maxAvgCost, not both")
        return self


class GateSpec(Model):
    """Sends uncertain requests to the general expert."""

    enabled: bool = Field(default=True, description="Whether uncertain requests go to the general expert.")
    strictness: float = Field(
        default=1.0, ge=0, le=10,
        description="1 = the thresholds chosen in training; above 1 gates more requests, below 1 fewer, 0 none.",
    )  # fmt: skip
    decline_below: float | None = Field(
        default=None, gt=0, le=1,
        description="A request of which even the best expert is expected to score less is declined and asks nobody; None = never.",
    )  # fmt: skip


class LearningSpec(Model):
    """What ``POST /v1/feedback`` changes: expected scores, by category and expert, within bounds. Each replica learns by itself."""

    max_shift: float = Field(default=0.05, gt=0, le=0.5, description="No expected score moves further than this.")
    min_feedback: int = Field(
        default=20, ge=1, le=1_000_000, description="Feedbacks of an expert in a category before anything moves there."
    )
    prior_feedback: float = Field(
        default=50.0, ge=0, le=1e6, description="Weight of the artifact: as if so many feedbacks had been just as it expected."
    )
    memory: float = Field(default=1000.0, ge=10, le=1e9, description="Feedbacks after which an old one has faded to about a third.")
    drift_alarm: float = Field(
        default=20.0, ge=1, le=1000,
        description="Standard deviations that residuals add up to, beyond a quarter each, before the alarm is raised.",
    )  # fmt: skip
    log: Line | None = Field(
        default=None, min_length=1, max_length=1024,
        description="File of feedbacks without prompts: replayed at start; one per replica. None = forgotten with the process.",
    )  # fmt: skip


class StickinessSpec(Model):
    """Keeps the requests of one session at one expert while that costs little."""

    enabled: bool = Field(default=True, description="Whether sessions stick.")
    margin: float = Field(default=0.03, ge=0, le=1, description="Score given up to stay with the session's expert.")
    ttl_s: float = Field(default=900.0, gt=0, le=86_400, description="A session idle this long is forgotten.")


class RuleMatch(Model):
    """All that is given must hold. At least one condition is needed."""

    category: Line | None = Field(default=None, description="The request asks for this category.", min_length=1, max_length=128)
    header: str | None = Field(
        default=None, pattern=r"^[a-z0-9][-a-z0-9]{0,63}$", description="A request header, in lower case, that must be present."
    )
    value: HeaderValue | None = Field(default=None, description="The header's value; None = any.", max_length=1024)
    language: str | None = Field(default=None, pattern=r"^[a-z]{2,3}$", description="Language of the prompt, as an ISO 639 code.")
    min_context_tokens: int | None = Field(default=None, ge=1, le=100_000_000, description="Prompt at least this long, in tokens.")
    max_context_tokens: int | None = Field(default=None, ge=1, le=100_000_000, description="Prompt at most this long, in tokens.")

    @model_validator(mode="after")
    def _says_something(self) -> RuleMatch:
        conditions = (self.category, self.header, self.language, self.min_context_tokens, self.max_context_tokens)
        if all(condition is None for condition in conditions):
            raise ValueError("needs at least one of category, header, language, minContextTokens, maxContextTokens")
        if self.value is not None and self.header is None:
            raise ValueError("value: needs a header")
        return self


class RuleSpec(Model):
    """A rule that comes before the router: the first that matches and whose expert can serve the request decides."""

    name: Name = Field(description="Name of the rule, shown in the decision's reason.")
    when: RuleMatch = Field(description="What must hold.")
    expert: Name = Field(description="The expert that serves it.")


class LimitsSpec(Model):
    """Bounds that protect experts from each other."""

    connect_timeout_s: float = Field(default=2.0, gt=0, le=60, description="Connecting to an external expert.")
    first_token_timeout_s: float = Field(
        default=30.0, gt=0, le=3600, description="An expert that has sent nothing by then is left for a fallback."
    )
    idle_timeout_s: float = Field(default=30.0, gt=0, le=3600, description="Silence between two parts of an answer.")
    max_concurrent_per_expert: int = Field(
        default=256, ge=1, le=1_000_000, description="Requests at one external expert at once, per gateway, before 429."
    )
    breaker_failures: int = Field(default=3, ge=1, le=1000, description="Failures in a row that open an expert's circuit.")
    breaker_open_s: float = Field(default=10.0, gt=0, le=3600, description="An open circuit tries again after this.")


class AuthSpec(Model):
    """Which experts a caller may reach."""

    allow_experts_header: Line | None = Field(
        default=None,
        description="Trusted header (set by a proxy) that lists the allowed experts, comma-separated; None = all.",
        max_length=256,
    )


class TiersSpec(Model):
    """Experts that share memory: a resident tier, a host-memory tier and the disk below it."""

    resident_memory: Quantity = Field(description="Memory for resident experts.")
    host_memory: Quantity = Field(default="0", description="Memory for experts kept in host memory, ready to load.")
    fairness_window_s: float = Field(default=5.0, gt=0, le=3600, description="Grouping by expert delays nobody longer than this.")
    prefetch: bool = Field(default=True, description="Bring a likely next expert from disk to host memory ahead of time.")

    @property
    def resident_memory_bytes(self) -> int:
        """Memory for resident experts, in bytes."""
        return int(parse_quantity(self.resident_memory))

    @property
    def host_memory_bytes(self) -> int:
        """Memory for copies in host memory, in bytes."""
        return int(parse_quantity(self.host_memory))


class CompositionSpec(Model):
    """Which experts answer, and how one is picked."""

    experts: tuple[ExpertSpec, ...] = Field(description="The experts.", min_length=1, max_length=256)
    general: Name = Field(description="The expert for uncertain requests, and the last fallback.")
    categories: tuple[CategorySpec, ...] = Field(default=(), description="Categories with a fixed mapping.", max_length=1024)
    router: RouterSpec = Field(default_factory=RouterSpec, description="The router's artifact, pool and limits.")
    policy: PolicySpec = Field(default_factory=PolicySpec, description="What to weigh against quality.")
    combine: CombineSpec | None = Field(default=None, description="Ask more than one expert; None = one expert answers.")
    gate: GateSpec = Field(default_factory=GateSpec, description="What happens to uncertain requests.")
    learning: LearningSpec | None = Field(default=None, description="Learn from feedback; None = it is kept and changes nothing.")
    stickiness: StickinessSpec = Field(default_factory=StickinessSpec, description="How sessions keep their expert.")
    rules: tuple[RuleSpec, ...] = Field(default=(), description="Rules that come first, in order.", max_length=256)
    fallbacks: tuple[Name, ...] = Field(
        default=(), description="Experts to try, in order, when the chosen one fails; then the runner-up, then the general expert.",
        max_length=256,
    )  # fmt: skip
    limits: LimitsSpec = Field(default_factory=LimitsSpec, description="Bounds that protect experts from each other.")
    auth: AuthSpec = Field(default_factory=AuthSpec, description="Which experts a caller may reach.")
    tiers: TiersSpec | None = Field(default=None, description="Experts that share memory; None = each has its own.")

    _lists = field_validator("experts", "categories", "rules", "fallbacks", mode="before")(as_tuple)

    @model_validator(mode="after")
    def _names_fit(self) -> CompositionSpec:
        names = [expert.name for expert in self.experts]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"experts: the name {name!r} is used more than once")
        for where, name in self._references():
            if name not in names:
                raise ValueError(f"{where}: there is no expert {name!r}; experts are {', '.join(names)}")
        categories = [category.name for category in self.categories]
        for category in categories:
            if categories.count(category) > 1:
                raise ValueError(f"categories: the name {category!r} is used more than once")
        rules = [rule.name for rule in self.rules]
        for rule in rules:
            if rules.count(rule) > 1:
                raise ValueError(f"rules: the name {rule!r} is used more than once")
        return self

    def _references(self) -> list[tuple[str, str]]:
        found = [("general", self.general)]
        found += [(f"categories.{i}.expert", c.expert) for i, c in enumerate(self.categories) if c.expert is not None]
        found += [(f"rules.{i}.expert", rule.expert) for i, rule in enumerate(self.rules)]
        if self.combine is not None:
            found += [(f"combine.experts.{i}", name) for i, name in enumerate(self.combine.experts)]
            found += [(f"combine.checks.{i}.expert", check.expert) for i, check in enumerate(self.combine.checks)]
        found += [(f"fallbacks.{i}", name) for i, name in enumerate(self.fallbacks)]
        return found

    def expert(self, name: str) -> ExpertSpec:
        """The expert of that name; names are checked when the document is parsed."""
        return next(expert for expert in self.experts if expert.name == name)


class CompositionOfExperts(Model):
    """The whole document."""

    api_version: Literal["serving.antiphon.dev/v1alpha1"] = Field(description="Group and version of the kind.")
    kind: Literal["CompositionOfExperts"] = Field(description="The kind.")
    metadata: Metadata = Field(description="Name, namespace, labels and annotations.", strict=False)
    spec: CompositionSpec = Field(description="Which experts answer, and how one is picked.")

    @property
    def model_name(self) -> str:
        """The name that clients send."""
        return f"coe/{self.metadata.name}"


def split_model_name(model: str) -> tuple[str, Policy | None] | None:
    """``coe/<name>[:<policy>]`` as (name, policy or None); None when ``model`` names no composition.

    An unknown policy is kept as part of the name, so that the caller answers that no such model is served.
    """
    if not model.startswith("coe/"):
        return None
    name, _, suffix = model.removeprefix("coe/").partition(":")
    for policy in POLICIES:
        if suffix == policy:
            return name, policy
    return (f"{name}:{suffix}" if suffix else name), None


def policy_named(text: str) -> Policy:
    """A policy by its name.

    Raises:
        InvalidInput: there is no such policy.
    """
    for policy in POLICIES:
        if text == policy:
            return policy
    raise InvalidInput(f"policy must be one of {', '.join(POLICIES)}", "policy")
