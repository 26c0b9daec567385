from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class RouteRequest(_message.Message):
    __slots__ = ("model", "prompt", "session", "expert", "category", "language", "headers", "context_tokens", "modalities", "tools", "allowed_experts", "restricted", "avoided_experts")
    class HeadersEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    MODEL_FIELD_NUMBER: _ClassVar[int]
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    SESSION_FIELD_NUMBER: _ClassVar[int]
    EXPERT_FIELD_NUMBER: _ClassVar[int]
    CATEGORY_FIELD_NUMBER: _ClassVar[int]
    LANGUAGE_FIELD_NUMBER: _ClassVar[int]
    HEADERS_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MODALITIES_FIELD_NUMBER: _ClassVar[int]
    TOOLS_FIELD_NUMBER: _ClassVar[int]
    ALLOWED_EXPERTS_FIELD_NUMBER: _ClassVar[int]
    RESTRICTED_FIELD_NUMBER: _ClassVar[int]
    AVOIDED_EXPERTS_FIELD_NUMBER: _ClassVar[int]
    model: str
    prompt: str
    session: str
    expert: str
    category: str
    language: str
    headers: _containers.ScalarMap[str, str]
    context_tokens: int
    modalities: _containers.RepeatedScalarFieldContainer[str]
    tools: bool
    allowed_experts: _containers.RepeatedScalarFieldContainer[str]
    restricted: bool
    avoided_experts: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, model: _Optional[str] = ..., prompt: _Optional[str] = ..., session: _Optional[str] = ..., expert: _Optional[str] = ..., category: _Optional[str] = ..., language: _Optional[str] = ..., headers: _Optional[_Mapping[str, str]] = ..., context_tokens: _Optional[int] = ..., modalities: _Optional[_Iterable[str]] = ..., tools: _Optional[bool] = ..., allowed_experts: _Optional[_Iterable[str]] = ..., restricted: _Optional[bool] = ..., avoided_experts: _Optional[_Iterable[str]] = ...) -> None: ...

class RouteDecision(_message.Message):
    __slots__ = ("decision_id", "expert", "reason", "detail", "policy", "runner_up", "alternatives", "category", "confidence", "familiarity", "slow_path", "artifact", "candidates", "view_version", "probabilities")
    class ProbabilitiesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    DECISION_ID_FIELD_NUMBER: _ClassVar[int]
    EXPERT_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    POLICY_FIELD_NUMBER: _ClassVar[int]
    RUNNER_UP_FIELD_NUMBER: _ClassVar[int]
    ALTERNATIVES_FIELD_NUMBER: _ClassVar[int]
    CATEGORY_FIELD_NUMBER: _ClassVar[int]
    CONFIDENCE_FIELD_NUMBER: _ClassVar[int]
    FAMILIARITY_FIELD_NUMBER: _ClassVar[int]
    SLOW_PATH_FIELD_NUMBER: _ClassVar[int]
    ARTIFACT_FIELD_NUMBER: _ClassVar[int]
    CANDIDATES_FIELD_NUMBER: _ClassVar[int]
    VIEW_VERSION_FIELD_NUMBER: _ClassVar[int]
    PROBABILITIES_FIELD_NUMBER: _ClassVar[int]
    decision_id: str
    expert: str
    reason: str
    detail: str
    policy: str
    runner_up: str
    alternatives: _containers.RepeatedScalarFieldContainer[str]
    category: str
    confidence: float
    familiarity: float
    slow_path: bool
    artifact: str
    candidates: _containers.RepeatedCompositeFieldContainer[RouteCandidate]
    view_version: int
    probabilities: _containers.ScalarMap[str, float]
    def __init__(self, decision_id: _Optional[str] = ..., expert: _Optional[str] = ..., reason: _Optional[str] = ..., detail: _Optional[str] = ..., policy: _Optional[str] = ..., runner_up: _Optional[str] = ..., alternatives: _Optional[_Iterable[str]] = ..., category: _Optional[str] = ..., confidence: _Optional[float] = ..., familiarity: _Optional[float] = ..., slow_path: _Optional[bool] = ..., artifact: _Optional[str] = ..., candidates: _Optional[_Iterable[_Union[RouteCandidate, _Mapping]]] = ..., view_version: _Optional[int] = ..., probabilities: _Optional[_Mapping[str, float]] = ...) -> None: ...

class RouteCandidate(_message.Message):
    __slots__ = ("expert", "score", "cost", "wait", "total", "blocked_by", "lead")
    EXPERT_FIELD_NUMBER: _ClassVar[int]
    SCORE_FIELD_NUMBER: _ClassVar[int]
    COST_FIELD_NUMBER: _ClassVar[int]
    WAIT_FIELD_NUMBER: _ClassVar[int]
    TOTAL_FIELD_NUMBER: _ClassVar[int]
    BLOCKED_BY_FIELD_NUMBER: _ClassVar[int]
    LEAD_FIELD_NUMBER: _ClassVar[int]
    expert: str
    score: float
    cost: float
    wait: float
    total: float
    blocked_by: str
    lead: float
    def __init__(self, expert: _Optional[str] = ..., score: _Optional[float] = ..., cost: _Optional[float] = ..., wait: _Optional[float] = ..., total: _Optional[float] = ..., blocked_by: _Optional[str] = ..., lead: _Optional[float] = ...) -> None: ...

class ExplainRequest(_message.Message):
    __slots__ = ("decision_id", "policy")
    DECISION_ID_FIELD_NUMBER: _ClassVar[int]
    POLICY_FIELD_NUMBER: _ClassVar[int]
    decision_id: str
    policy: str
    def __init__(self, decision_id: _Optional[str] = ..., policy: _Optional[str] = ...) -> None: ...

class ExplainResponse(_message.Message):
    __slots__ = ("decision", "composition", "decided_s", "took_s", "probabilities", "replay")
    class ProbabilitiesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    DECISION_FIELD_NUMBER: _ClassVar[int]
    COMPOSITION_FIELD_NUMBER: _ClassVar[int]
    DECIDED_S_FIELD_NUMBER: _ClassVar[int]
    TOOK_S_FIELD_NUMBER: _ClassVar[int]
    PROBABILITIES_FIELD_NUMBER: _ClassVar[int]
    REPLAY_FIELD_NUMBER: _ClassVar[int]
    decision: RouteDecision
    composition: str
    decided_s: float
    took_s: float
    probabilities: _containers.ScalarMap[str, float]
    replay: RouteDecision
    def __init__(self, decision: _Optional[_Union[RouteDecision, _Mapping]] = ..., composition: _Optional[str] = ..., decided_s: _Optional[float] = ..., took_s: _Optional[float] = ..., probabilities: _Optional[_Mapping[str, float]] = ..., replay: _Optional[_Union[RouteDecision, _Mapping]] = ...) -> None: ...

class FeedbackRequest(_message.Message):
    __slots__ = ("decision_id", "score", "expert")
    DECISION_ID_FIELD_NUMBER: _ClassVar[int]
    SCORE_FIELD_NUMBER: _ClassVar[int]
    EXPERT_FIELD_NUMBER: _ClassVar[int]
    decision_id: str
    score: float
    expert: str
    def __init__(self, decision_id: _Optional[str] = ..., score: _Optional[float] = ..., expert: _Optional[str] = ...) -> None: ...

class FeedbackResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListExpertsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListExpertsResponse(_message.Message):
    __slots__ = ("experts",)
    EXPERTS_FIELD_NUMBER: _ClassVar[int]
    experts: _containers.RepeatedCompositeFieldContainer[ExpertInfo]
    def __init__(self, experts: _Optional[_Iterable[_Union[ExpertInfo, _Mapping]]] = ...) -> None: ...

class ExpertInfo(_message.Message):
    __slots__ = ("composition", "name", "external", "general", "healthy", "resident", "num_waiting", "expected_wait_s", "active_params_b", "context_tokens", "modalities", "tools")
    COMPOSITION_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    EXTERNAL_FIELD_NUMBER: _ClassVar[int]
    GENERAL_FIELD_NUMBER: _ClassVar[int]
    HEALTHY_FIELD_NUMBER: _ClassVar[int]
    RESIDENT_FIELD_NUMBER: _ClassVar[int]
    NUM_WAITING_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_WAIT_S_FIELD_NUMBER: _ClassVar[int]
    ACTIVE_PARAMS_B_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MODALITIES_FIELD_NUMBER: _ClassVar[int]
    TOOLS_FIELD_NUMBER: _ClassVar[int]
    composition: str
    name: str
    external: bool
    general: bool
    healthy: bool
    resident: bool
    num_waiting: int
    expected_wait_s: float
    active_params_b: float
    context_tokens: int
    modalities: _containers.RepeatedScalarFieldContainer[str]
    tools: bool
    def __init__(self, composition: _Optional[str] = ..., name: _Optional[str] = ..., external: _Optional[bool] = ..., general: _Optional[bool] = ..., healthy: _Optional[bool] = ..., resident: _Optional[bool] = ..., num_waiting: _Optional[int] = ..., expected_wait_s: _Optional[float] = ..., active_params_b: _Optional[float] = ..., context_tokens: _Optional[int] = ..., modalities: _Optional[_Iterable[str]] = ..., tools: _Optional[bool] = ...) -> None: ...
