"""The CEL rules of the kinds, each with a message a person can act on (control speed, data).

They say in the API server what the typed documents say on a laptop; ``path`` names the schema node a rule hangs on, with []
for the items of a list. A rule that mentions oldSelf is checked on updates only.

Must not know: how schemas are generated.
"""

from __future__ import annotations

from dataclasses import dataclass

from antiphon.core.document.part import MAX_NAME_LENGTH
from antiphon.core.document.policies import RESERVED_POOL_NAMES
from antiphon_operator.render.names import RAY_WORKER_PORTS, RESERVED_PORTS, URI_PATTERN


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """One validation rule: where it hangs, what must be true, and what to say when it is not."""

    path: str
    rule: str
    message: str


def _needs(role: str, topologies: tuple[str, ...]) -> Rule:
    listed = ", ".join(f"'{t}'" for t in topologies)
    named = " and ".join(topologies)
    return Rule(
        path="spec",
        rule=f"(self.topology in [{listed}]) == self.pools.exists(p, p.role == '{role}')",
        message=f"topology {named} needs a pool with role {role}, and no other topology may have one",
    )


_FLOOR = "(has({p}.scaling.minReplicas) && {p}.scaling.mode != 'Static' ? {p}.scaling.minReplicas : {p}.replicas)"
_CEILING = "(has({p}.scaling.maxReplicas) && {p}.scaling.mode != 'Static' ? {p}.scaling.maxReplicas : {p}.replicas)"
_SHARDS = "(self.parallelism.tensor * self.parallelism.expert)"

NAME_LENGTH = Rule(
    path="",
    rule=f"size(self.metadata.name) <= {MAX_NAME_LENGTH}",
    message=f"metadata.name must have at most {MAX_NAME_LENGTH} characters: names of children are made from it",
)

_PORTS = ", ".join(str(port) for port in sorted(RESERVED_PORTS))
_FIRST_WORKER_PORT, _LAST_WORKER_PORT = RAY_WORKER_PORTS


def _port_is_free(field: str) -> str:
    return f"!(self.{field} in [{_PORTS}]) && (self.{field} < {_FIRST_WORKER_PORT} || self.{field} > {_LAST_WORKER_PORT})"


LLM_RULES: tuple[Rule, ...] = (
    NAME_LENGTH,
    Rule(
        path="spec.model",
        rule=f"self.uri.matches('{URI_PATTERN}')",
        message="model.uri must be hf://organisation/name, s3://bucket/prefix, pvc://claim/path, pypi://package@version/file, or "
        "an absolute path inside the image",
    ),
    Rule(
        path="spec.speculation.model",
        rule="has(self.uri) != has(self.deploymentRef)",
        message="exactly one of uri and deploymentRef is needed for a draft model",
    ),
    Rule(
        path="spec.speculation.model",
        rule=f"!has(self.uri) || self.uri.matches('{URI_PATTERN}')",
        message="speculation.model.uri must be hf://organisation/name, s3://bucket/prefix, pvc://claim/path, "
        "pypi://package@version/file, or an absolute path inside the image",
    ),
    Rule(
        path="spec.speculation.model",
        rule="!has(self.revision) || has(self.uri)",
        message="revision goes with uri: the deployment that deploymentRef names says its own",
    ),
    Rule(
        path="",
        rule="!has(self.spec.speculation) || !has(self.spec.speculation.model) || "
        "!has(self.spec.speculation.model.deploymentRef) || self.spec.speculation.model.deploymentRef != self.metadata.name",
        message="speculation.model.deploymentRef names this deployment itself: name a smaller one",
    ),
    Rule(
        path="spec",
        rule="self.pools.all(p, p.scaling.mode != 'SLO' || has(self.slo.ttftMs) || has(self.slo.tpotMs) || "
        "has(p.scaling.targetQueuePerWorker) || has(p.scaling.targetKvUsage))",
        message="scaling mode SLO needs something to follow: slo.ttftMs, slo.tpotMs, or the pool's scaling.targetQueuePerWorker or "
        "scaling.targetKvUsage",
    ),
    Rule(
        path="spec.endpoint",
        rule=f"{_port_is_free('httpPort')} && {_port_is_free('grpcPort')} && "
        "(self.httpPort != self.grpcPort || self.httpPort == 0)",
        message="endpoint.httpPort and endpoint.grpcPort must differ and be none of the ports that Ray uses in the same pods: "
        f"{_PORTS}, {_FIRST_WORKER_PORT} to {_LAST_WORKER_PORT}",
    ),
    Rule(
        path="",
        rule="self.metadata.name.matches('^[a-z]([-a-z0-9]*[a-z0-9])?$')",
        message="metadata.name must be a DNS label: lower-case letters, digits and '-', starting with a letter",
    ),
    _needs("ffn", ("afd", "pd-afd")),
    _needs("attention", ("afd", "pd-afd")),
    _needs("prefill", ("pd", "pd-afd")),
    _needs("decode", ("pd",)),
    _needs("monolith", ("monolith",)),
    Rule(
        path="spec",
        rule="!has(self.model.numExperts) || self.pools.all(p, p.role != 'ffn' || "
        "self.model.numExperts % p.parallelism.expert == 0)",
        message="model.numExperts must divide evenly over parallelism.expert of every ffn pool",
    ),
    Rule(
        path="spec",
        rule="self.pools.all(p, self.pools.all(q, p.role != 'ffn' || q.role != 'ffn' || "
        "(p.parallelism.tensor == q.parallelism.tensor && p.parallelism.expert == q.parallelism.expert)))",
        message="all ffn pools must have the same parallelism",
    ),
    Rule(
        path="spec",
        rule="!has(self.ratios) || self.ratios.all(r, self.pools.exists(p, p.name == r.numerator) && "
        "self.pools.exists(p, p.name == r.denominator))",
        message="ratios must name existing pools in numerator and denominator",
    ),
    Rule(
        path="spec",
        rule="!has(self.gpuBudget) || self.pools.all(p, "
        f"self.pools.map(q, {_FLOOR.format(p='q')} * q.resources.gpu).sum() + "
        f"({_CEILING.format(p='p')} - {_FLOOR.format(p='p')}) * p.resources.gpu <= self.gpuBudget)",
        message="gpuBudget must cover the largest size of each pool beside the smallest sizes of the others: raise it, or lower "
        "replicas or scaling.maxReplicas",
    ),
    Rule(
        path="spec",
        rule="self.topology == oldSelf.topology",
        message="topology can't be changed: create a deployment of another name and move traffic to it",
    ),
    Rule(
        path="spec.model",
        rule="has(self.name) == has(oldSelf.name) && (!has(self.name) || self.name == oldSelf.name)",
        message="model.name can't be changed: clients send it; create another deployment",
    ),
    Rule(
        path="spec.pools[]",
        rule="self.role == oldSelf.role",
        message="the role of a pool can't be changed: add a pool of another name",
    ),
    Rule(
        path="spec.pools[]",
        rule="!(self.name in [{}])".format(", ".join(f"'{name}'" for name in RESERVED_POOL_NAMES)),
        message=f"the pool names {' and '.join(RESERVED_POOL_NAMES)} are reserved",
    ),
    Rule(
        path="spec.pools[]",
        rule=f"self.role == 'ffn' || {_SHARDS} == 1",
        message="parallelism is for ffn pools only",
    ),
    Rule(
        path="spec.pools[]",
        rule=f"self.replicas % {_SHARDS} == 0",
        message="replicas must be a multiple of parallelism.tensor x parallelism.expert: one worker per shard and copy",
    ),
    Rule(
        path="spec.pools[]",
        rule=f"(!has(self.scaling.minReplicas) || self.scaling.minReplicas % {_SHARDS} == 0) && "
        f"(!has(self.scaling.maxReplicas) || self.scaling.maxReplicas % {_SHARDS} == 0)",
        message="scaling.minReplicas and scaling.maxReplicas must be multiples of parallelism.tensor x parallelism.expert",
    ),
    Rule(
        path="spec.pools[].scaling",
        rule="self.mode == 'Static' || (has(self.minReplicas) && has(self.maxReplicas))",
        message="scaling mode External or SLO needs minReplicas and maxReplicas",
    ),
    Rule(
        path="spec.pools[].scaling",
        rule="!has(self.minReplicas) || !has(self.maxReplicas) || self.minReplicas <= self.maxReplicas",
        message="minReplicas must not be above maxReplicas",
    ),
    Rule(
        path="spec.ratios[]",
        rule="self.numerator != self.denominator",
        message="numerator and denominator must be different pools",
    ),
    Rule(
        path="spec.ratios[]",
        rule="!has(self.min) || !has(self.max) || self.min <= self.max",
        message="min must not be above max",
    ),
    Rule(
        path="spec.transport.numUbatches",
        rule="type(self) == string ? self == 'auto' : (self >= 1 && self <= 8)",
        message="numUbatches must be auto or between 1 and 8",
    ),
)

POOL_RULES: tuple[Rule, ...] = (
    Rule(
        path="spec",
        rule="self.deployment == oldSelf.deployment && self.pool == oldSelf.pool && self.role == oldSelf.role",
        message="deployment, pool and role of a ServingPool can't be changed",
    ),
    Rule(
        path="spec",
        rule="self.minReplicas <= self.maxReplicas",
        message="minReplicas must not be above maxReplicas",
    ),
)

ARTIFACT_RULES: tuple[Rule, ...] = (
    NAME_LENGTH,
    Rule(
        path="spec",
        rule="self.uri == oldSelf.uri && has(self.revision) == has(oldSelf.revision) && "
        "(!has(self.revision) || self.revision == oldSelf.revision)",
        message="uri and revision can't be changed: create another ModelArtifact",
    ),
    Rule(
        path="spec",
        rule="!self.uri.startsWith('pvc://') || !has(self.storage.claimName)",
        message="a pvc:// uri is used in place: leave storage.claimName out",
    ),
)

_EXPERT_EXISTS = "self.experts.exists(e, e.name == {name})"

COMPOSITION_RULES: tuple[Rule, ...] = (
    NAME_LENGTH,
    Rule(
        path="spec.experts[]",
        rule="has(self.deploymentRef) != has(self.external)",
        message="each expert needs exactly one of deploymentRef and external",
    ),
    Rule(
        path="spec.experts[]",
        rule="!has(self.apiKeySecret) || has(self.deploymentRef)",
        message="apiKeySecret is for a deploymentRef: an external expert has external.apiKeySecret",
    ),
    Rule(
        path="spec.experts[].external",
        rule="!(has(self.apiKeyEnv) && has(self.apiKeySecret))",
        message="give apiKeyEnv or apiKeySecret, not both",
    ),
    Rule(
        path="spec.experts[].external",
        rule="self.url.startsWith('http://') || self.url.startsWith('https://')",
        message="external.url must start with http:// or https://",
    ),
    Rule(
        path="spec",
        rule=_EXPERT_EXISTS.format(name="self.general"),
        message="general must name one of the experts",
    ),
    Rule(
        path="spec",
        # Comparing names one by one would be above what the API server lets a rule cost, at the most categories and experts.
        rule="!has(self.categories) || self.categories.all(c, !has(c.expert) || c.expert in self.experts.map(e, e.name))",
        message="categories must map to one of the experts",
    ),
    Rule(
        path="spec",
        rule=f"!has(self.rules) || self.rules.all(r, {_EXPERT_EXISTS.format(name='r.expert')})",
        message="rules must name one of the experts",
    ),
    Rule(
        path="spec",
        rule=f"!has(self.fallbacks) || self.fallbacks.all(f, {_EXPERT_EXISTS.format(name='f')})",
        message="fallbacks must name some of the experts",
    ),
    Rule(
        path="spec",
        rule="!has(self.combine) || self.combine.experts.all(n, self.experts.exists(e, e.name == n)) && "
        "(!has(self.combine.checks) || self.combine.checks.all(c, self.experts.exists(e, e.name == c.expert)))",
        message="combine must name some of the experts",
    ),
    Rule(
        path="spec.combine",
        rule="self.experts.all(n, self.experts.exists_one(e, e == n))",
        message="combine asks each expert once",
    ),
    Rule(
        path="spec.combine",
        rule="self.mode != 'vote' || self.minVotes <= size(self.experts)",
        message="minVotes must not be above the number of combined experts",
    ),
    Rule(
        path="spec.combine",
        rule="self.mode != 'cascade' || self.experts.all(n, has(self.checks) && self.checks.exists(c, c.expert == n) || "
        "self.otherwise != 'decline' && n == self.experts[size(self.experts) - 1])",
        message="a cascade needs a check for each expert, but for the last one when otherwise is answer",
    ),
    Rule(
        path="spec.policy",
        rule="self.name != 'budget' || has(self.maxAvgActiveParamsB) || has(self.maxAvgCost)",
        message="policy budget needs maxAvgActiveParamsB or maxAvgCost",
    ),
    Rule(
        path="spec.policy",
        rule="self.name != 'at-least' || has(self.atLeast)",
        message="policy at-least needs atLeast",
    ),
    Rule(
        path="spec.policy",
        rule="!(has(self.maxAvgActiveParamsB) && has(self.maxAvgCost))",
        message="give maxAvgActiveParamsB or maxAvgCost, not both",
    ),
    Rule(
        path="spec.rules[].when",
        rule="has(self.category) || has(self.header) || has(self.language) || has(self.minContextTokens) || "
        "has(self.maxContextTokens)",
        message="a rule needs at least one of category, header, language, minContextTokens and maxContextTokens",
    ),
    Rule(
        path="spec.rules[].when",
        rule="!has(self.value) || has(self.header)",
        message="value needs a header",
    ),
)
