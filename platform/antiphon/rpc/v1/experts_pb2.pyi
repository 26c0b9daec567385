from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class GetExpertLoadRequest(_message.Message):
    __slots__ = ("deployment",)
    DEPLOYMENT_FIELD_NUMBER: _ClassVar[int]
    deployment: str
    def __init__(self, deployment: _Optional[str] = ...) -> None: ...

class GetExpertLoadResponse(_message.Message):
    __slots__ = ("deployment", "placement_number", "placement_json", "layers")
    DEPLOYMENT_FIELD_NUMBER: _ClassVar[int]
    PLACEMENT_NUMBER_FIELD_NUMBER: _ClassVar[int]
    PLACEMENT_JSON_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    deployment: str
    placement_number: int
    placement_json: str
    layers: _containers.RepeatedCompositeFieldContainer[LayerRows]
    def __init__(self, deployment: _Optional[str] = ..., placement_number: _Optional[int] = ..., placement_json: _Optional[str] = ..., layers: _Optional[_Iterable[_Union[LayerRows, _Mapping]]] = ...) -> None: ...

class LayerRows(_message.Message):
    __slots__ = ("layer", "rows")
    LAYER_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    layer: int
    rows: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, layer: _Optional[int] = ..., rows: _Optional[_Iterable[int]] = ...) -> None: ...

class RebalanceRequest(_message.Message):
    __slots__ = ("deployment", "placement_json", "num_redundant")
    DEPLOYMENT_FIELD_NUMBER: _ClassVar[int]
    PLACEMENT_JSON_FIELD_NUMBER: _ClassVar[int]
    NUM_REDUNDANT_FIELD_NUMBER: _ClassVar[int]
    deployment: str
    placement_json: str
    num_redundant: int
    def __init__(self, deployment: _Optional[str] = ..., placement_json: _Optional[str] = ..., num_redundant: _Optional[int] = ...) -> None: ...

class RebalanceResponse(_message.Message):
    __slots__ = ("worker_id",)
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    def __init__(self, worker_id: _Optional[str] = ...) -> None: ...

class PlaceRequest(_message.Message):
    __slots__ = ("phase", "number", "placement_json")
    class Phase(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        PHASE_UNSPECIFIED: _ClassVar[PlaceRequest.Phase]
        HOLD: _ClassVar[PlaceRequest.Phase]
        USE: _ClassVar[PlaceRequest.Phase]
        RELEASE: _ClassVar[PlaceRequest.Phase]
    PHASE_UNSPECIFIED: PlaceRequest.Phase
    HOLD: PlaceRequest.Phase
    USE: PlaceRequest.Phase
    RELEASE: PlaceRequest.Phase
    PHASE_FIELD_NUMBER: _ClassVar[int]
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    PLACEMENT_JSON_FIELD_NUMBER: _ClassVar[int]
    phase: PlaceRequest.Phase
    number: int
    placement_json: str
    def __init__(self, phase: _Optional[_Union[PlaceRequest.Phase, str]] = ..., number: _Optional[int] = ..., placement_json: _Optional[str] = ...) -> None: ...

class PlaceResponse(_message.Message):
    __slots__ = ("done",)
    DONE_FIELD_NUMBER: _ClassVar[int]
    done: bool
    def __init__(self, done: _Optional[bool] = ...) -> None: ...
