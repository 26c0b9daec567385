from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class TraceStepsRequest(_message.Message):
    __slots__ = ("seconds",)
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    seconds: float
    def __init__(self, seconds: _Optional[float] = ...) -> None: ...

class TraceStepsResponse(_message.Message):
    __slots__ = ("worker", "role", "pid", "events")
    WORKER_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    EVENTS_FIELD_NUMBER: _ClassVar[int]
    worker: str
    role: str
    pid: int
    events: _containers.RepeatedCompositeFieldContainer[StepEvent]
    def __init__(self, worker: _Optional[str] = ..., role: _Optional[str] = ..., pid: _Optional[int] = ..., events: _Optional[_Iterable[_Union[StepEvent, _Mapping]]] = ...) -> None: ...

class StepEvent(_message.Message):
    __slots__ = ("mark", "start_s", "end_s", "step", "layer", "ubatch", "rows", "peer")
    MARK_FIELD_NUMBER: _ClassVar[int]
    START_S_FIELD_NUMBER: _ClassVar[int]
    END_S_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    LAYER_FIELD_NUMBER: _ClassVar[int]
    UBATCH_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    PEER_FIELD_NUMBER: _ClassVar[int]
    mark: str
    start_s: float
    end_s: float
    step: int
    layer: int
    ubatch: int
    rows: int
    peer: str
    def __init__(self, mark: _Optional[str] = ..., start_s: _Optional[float] = ..., end_s: _Optional[float] = ..., step: _Optional[int] = ..., layer: _Optional[int] = ..., ubatch: _Optional[int] = ..., rows: _Optional[int] = ..., peer: _Optional[str] = ...) -> None: ...
