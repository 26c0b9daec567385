from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class RegisterRequest(_message.Message):
    __slots__ = ("worker_info_json", "lease_s")
    WORKER_INFO_JSON_FIELD_NUMBER: _ClassVar[int]
    LEASE_S_FIELD_NUMBER: _ClassVar[int]
    worker_info_json: str
    lease_s: float
    def __init__(self, worker_info_json: _Optional[str] = ..., lease_s: _Optional[float] = ...) -> None: ...

class RegisterResponse(_message.Message):
    __slots__ = ("accepted",)
    ACCEPTED_FIELD_NUMBER: _ClassVar[int]
    accepted: bool
    def __init__(self, accepted: _Optional[bool] = ...) -> None: ...

class RemoveRequest(_message.Message):
    __slots__ = ("worker_id", "epoch")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    epoch: int
    def __init__(self, worker_id: _Optional[str] = ..., epoch: _Optional[int] = ...) -> None: ...

class RemoveResponse(_message.Message):
    __slots__ = ("removed",)
    REMOVED_FIELD_NUMBER: _ClassVar[int]
    removed: bool
    def __init__(self, removed: _Optional[bool] = ...) -> None: ...

class ListWorkersRequest(_message.Message):
    __slots__ = ("deployment",)
    DEPLOYMENT_FIELD_NUMBER: _ClassVar[int]
    deployment: str
    def __init__(self, deployment: _Optional[str] = ...) -> None: ...

class ListWorkersResponse(_message.Message):
    __slots__ = ("workers",)
    WORKERS_FIELD_NUMBER: _ClassVar[int]
    workers: _containers.RepeatedCompositeFieldContainer[WorkerLease]
    def __init__(self, workers: _Optional[_Iterable[_Union[WorkerLease, _Mapping]]] = ...) -> None: ...

class WorkerLease(_message.Message):
    __slots__ = ("worker_info_json", "age_s", "lease_s")
    WORKER_INFO_JSON_FIELD_NUMBER: _ClassVar[int]
    AGE_S_FIELD_NUMBER: _ClassVar[int]
    LEASE_S_FIELD_NUMBER: _ClassVar[int]
    worker_info_json: str
    age_s: float
    lease_s: float
    def __init__(self, worker_info_json: _Optional[str] = ..., age_s: _Optional[float] = ..., lease_s: _Optional[float] = ...) -> None: ...

class ClaimIndexRequest(_message.Message):
    __slots__ = ("deployment", "pool", "owner", "lease_s", "preferred")
    DEPLOYMENT_FIELD_NUMBER: _ClassVar[int]
    POOL_FIELD_NUMBER: _ClassVar[int]
    OWNER_FIELD_NUMBER: _ClassVar[int]
    LEASE_S_FIELD_NUMBER: _ClassVar[int]
    PREFERRED_FIELD_NUMBER: _ClassVar[int]
    deployment: str
    pool: str
    owner: str
    lease_s: float
    preferred: int
    def __init__(self, deployment: _Optional[str] = ..., pool: _Optional[str] = ..., owner: _Optional[str] = ..., lease_s: _Optional[float] = ..., preferred: _Optional[int] = ...) -> None: ...

class ClaimIndexResponse(_message.Message):
    __slots__ = ("index",)
    INDEX_FIELD_NUMBER: _ClassVar[int]
    index: int
    def __init__(self, index: _Optional[int] = ...) -> None: ...

class ReleaseIndexRequest(_message.Message):
    __slots__ = ("deployment", "pool", "owner")
    DEPLOYMENT_FIELD_NUMBER: _ClassVar[int]
    POOL_FIELD_NUMBER: _ClassVar[int]
    OWNER_FIELD_NUMBER: _ClassVar[int]
    deployment: str
    pool: str
    owner: str
    def __init__(self, deployment: _Optional[str] = ..., pool: _Optional[str] = ..., owner: _Optional[str] = ...) -> None: ...

class ReleaseIndexResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class NextEpochRequest(_message.Message):
    __slots__ = ("worker_id", "after")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    AFTER_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    after: int
    def __init__(self, worker_id: _Optional[str] = ..., after: _Optional[int] = ...) -> None: ...

class NextEpochResponse(_message.Message):
    __slots__ = ("epoch",)
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    def __init__(self, epoch: _Optional[int] = ...) -> None: ...

class PutNoteRequest(_message.Message):
    __slots__ = ("topic", "key", "text", "lease_s")
    TOPIC_FIELD_NUMBER: _ClassVar[int]
    KEY_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    LEASE_S_FIELD_NUMBER: _ClassVar[int]
    topic: str
    key: str
    text: str
    lease_s: float
    def __init__(self, topic: _Optional[str] = ..., key: _Optional[str] = ..., text: _Optional[str] = ..., lease_s: _Optional[float] = ...) -> None: ...

class PutNoteResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetNoteRequest(_message.Message):
    __slots__ = ("topic", "key")
    TOPIC_FIELD_NUMBER: _ClassVar[int]
    KEY_FIELD_NUMBER: _ClassVar[int]
    topic: str
    key: str
    def __init__(self, topic: _Optional[str] = ..., key: _Optional[str] = ...) -> None: ...

class GetNoteResponse(_message.Message):
    __slots__ = ("text",)
    TEXT_FIELD_NUMBER: _ClassVar[int]
    text: str
    def __init__(self, text: _Optional[str] = ...) -> None: ...

class ListNotesRequest(_message.Message):
    __slots__ = ("topic",)
    TOPIC_FIELD_NUMBER: _ClassVar[int]
    topic: str
    def __init__(self, topic: _Optional[str] = ...) -> None: ...

class ListNotesResponse(_message.Message):
    __slots__ = ("texts",)
    class TextsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    TEXTS_FIELD_NUMBER: _ClassVar[int]
    texts: _containers.ScalarMap[str, str]
    def __init__(self, texts: _Optional[_Mapping[str, str]] = ...) -> None: ...

class TakeBudgetRequest(_message.Message):
    __slots__ = ("tenant", "ticket", "num_tokens", "lease_s", "requests_per_min", "tokens_per_min", "num_streams")
    TENANT_FIELD_NUMBER: _ClassVar[int]
    TICKET_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    LEASE_S_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_PER_MIN_FIELD_NUMBER: _ClassVar[int]
    TOKENS_PER_MIN_FIELD_NUMBER: _ClassVar[int]
    NUM_STREAMS_FIELD_NUMBER: _ClassVar[int]
    tenant: str
    ticket: str
    num_tokens: int
    lease_s: float
    requests_per_min: int
    tokens_per_min: int
    num_streams: int
    def __init__(self, tenant: _Optional[str] = ..., ticket: _Optional[str] = ..., num_tokens: _Optional[int] = ..., lease_s: _Optional[float] = ..., requests_per_min: _Optional[int] = ..., tokens_per_min: _Optional[int] = ..., num_streams: _Optional[int] = ...) -> None: ...

class TakeBudgetResponse(_message.Message):
    __slots__ = ("exceeded", "retry_after_s")
    EXCEEDED_FIELD_NUMBER: _ClassVar[int]
    RETRY_AFTER_S_FIELD_NUMBER: _ClassVar[int]
    exceeded: str
    retry_after_s: float
    def __init__(self, exceeded: _Optional[str] = ..., retry_after_s: _Optional[float] = ...) -> None: ...

class SettleBudgetRequest(_message.Message):
    __slots__ = ("tenant", "ticket", "num_tokens")
    TENANT_FIELD_NUMBER: _ClassVar[int]
    TICKET_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    tenant: str
    ticket: str
    num_tokens: int
    def __init__(self, tenant: _Optional[str] = ..., ticket: _Optional[str] = ..., num_tokens: _Optional[int] = ...) -> None: ...

class SettleBudgetResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class RenewBudgetsRequest(_message.Message):
    __slots__ = ("tenant", "tickets", "lease_s")
    TENANT_FIELD_NUMBER: _ClassVar[int]
    TICKETS_FIELD_NUMBER: _ClassVar[int]
    LEASE_S_FIELD_NUMBER: _ClassVar[int]
    tenant: str
    tickets: _containers.RepeatedScalarFieldContainer[str]
    lease_s: float
    def __init__(self, tenant: _Optional[str] = ..., tickets: _Optional[_Iterable[str]] = ..., lease_s: _Optional[float] = ...) -> None: ...

class RenewBudgetsResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class UseRow(_message.Message):
    __slots__ = ("tenant", "model", "num_requests", "num_prompt_tokens", "num_cached_tokens", "num_output_tokens")
    TENANT_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    NUM_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    NUM_PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_OUTPUT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    tenant: str
    model: str
    num_requests: int
    num_prompt_tokens: int
    num_cached_tokens: int
    num_output_tokens: int
    def __init__(self, tenant: _Optional[str] = ..., model: _Optional[str] = ..., num_requests: _Optional[int] = ..., num_prompt_tokens: _Optional[int] = ..., num_cached_tokens: _Optional[int] = ..., num_output_tokens: _Optional[int] = ...) -> None: ...

class AddUseRequest(_message.Message):
    __slots__ = ("day", "batch", "uses")
    DAY_FIELD_NUMBER: _ClassVar[int]
    BATCH_FIELD_NUMBER: _ClassVar[int]
    USES_FIELD_NUMBER: _ClassVar[int]
    day: str
    batch: str
    uses: _containers.RepeatedCompositeFieldContainer[UseRow]
    def __init__(self, day: _Optional[str] = ..., batch: _Optional[str] = ..., uses: _Optional[_Iterable[_Union[UseRow, _Mapping]]] = ...) -> None: ...

class AddUseResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListUseRequest(_message.Message):
    __slots__ = ("day",)
    DAY_FIELD_NUMBER: _ClassVar[int]
    day: str
    def __init__(self, day: _Optional[str] = ...) -> None: ...

class ListUseResponse(_message.Message):
    __slots__ = ("uses",)
    USES_FIELD_NUMBER: _ClassVar[int]
    uses: _containers.RepeatedCompositeFieldContainer[UseRow]
    def __init__(self, uses: _Optional[_Iterable[_Union[UseRow, _Mapping]]] = ...) -> None: ...
