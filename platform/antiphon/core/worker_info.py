"""What a worker tells the directory about itself: identity, addresses, layout and load (control speed).

The gateway routes on it, peers pair on it, ``antiphon status`` prints it. JSON is its wire form (``to_json`` / ``from_json``); what
is read is checked field by field, since whoever wrote it may have been anybody.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from antiphon.core.errors import InvalidInput
from antiphon.core.ids import Endpoint, Epoch, FFNShard, Role, WorkerId
from antiphon.core.text.json_text import read_json_text

MAX_RECORD_BYTES = 1 << 18
_MAX_NAME_CHARS = 512
_MAX_TEXT_CHARS = 8192  # of messages and of lists of addresses
_MAX_GAUGES = 512
_MAX_COUNT = (1 << 53) - 1  # what a JSON number, or a script of Redis, holds without loss
_TEXTS = frozenset({"message", "data"})  # longer than a name


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerLoad:
    """A worker's load, renewed with its lease. Zero where the role has no such thing."""

    num_waiting: int = 0
    num_running: int = 0
    num_free_blocks: int = 0
    num_total_blocks: int = 0
    num_cached_blocks: int = 0
    num_steps: int = 0
    num_prompt_tokens: int = 0  # since start
    num_generation_tokens: int = 0  # since start
    num_preemptions: int = 0  # since start
    num_prefix_hit_tokens: int = 0  # since start
    num_prefix_query_tokens: int = 0  # since start
    num_peers: int = 0
    num_ffn_rows: int = 0  # FFN role: rows computed since start
    num_ffn_batches: int = 0  # FFN role: batches computed since start
    num_expert_choices: int = 0  # experts that rows chose since start, while skipping is on
    num_experts_skipped: int = 0  # of them, not computed
    placement: int = 0  # number of the expert placement it works by; 0 = the one that serving starts with
    num_kv_transfers: int = 0  # KV hand-offs sent or received since start
    num_kv_failures: int = 0
    resident_weight_bytes: int = 0
    resident_memory_bytes: int = 0
    gauges: dict[str, float] = field(default_factory=dict)  # further named figures, e.g. stage times


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerInfo:
    """One registered worker. ``revision`` and ``fingerprint`` must be equal for peers to pair.

    ``document_revision`` is what whoever deployed its document calls that; it keeps nobody from pairing.
    """

    worker_id: WorkerId
    deployment: str
    pool: str
    role: Role
    model: str
    revision: str
    fingerprint: str
    epoch: Epoch
    endpoint: Endpoint
    pid: int
    host: str
    shard: FFNShard = field(default_factory=FFNShard)
    ready: bool = False
    draining: bool = False
    message: str = ""  # why it is not ready
    max_model_len: int = 0
    vocab_size: int = 0
    block_size_tokens: int = 0
    max_num_seqs: int = 0
    max_queued_requests: int = 0
    num_experts: int = 0  # routed, of a sparse layer; 0 = the model has none
    document_revision: str = ""  # "" = nobody said
    load: WorkerLoad = field(default_factory=WorkerLoad)

    def to_json(self) -> str:
        """The wire form; round-trips through ``from_json``."""
        value = _plain(self)  # dataclasses.asdict copies all the way down, at every renewal
        value["role"] = self.role.value
        for name in ("endpoint", "shard", "load"):
            value[name] = _plain(value[name])
        return json.dumps(value, separators=(",", ":"), sort_keys=True)

    @classmethod
    def from_json(cls, text: str | bytes) -> WorkerInfo:
        """Parse the wire form; unknown keys of a newer version are ignored.

        Raises:
            InvalidInput: the text is not a worker's record, or a field has another type or is out of bounds.
        """
        if len(text) > MAX_RECORD_BYTES:
            raise InvalidInput(f"not a worker record: {len(text)} bytes, at most {MAX_RECORD_BYTES} are taken", "worker_info")
        try:
            raw = read_json_text(text, unique_keys=True)
            value = _checked(cls, raw)
            value["role"] = Role(raw["role"])
            value["endpoint"] = Endpoint(**_checked(Endpoint, raw["endpoint"]))
            value["shard"] = FFNShard(**_checked(FFNShard, raw.get("shard", {})))
            value["load"] = WorkerLoad(**_checked(WorkerLoad, raw.get("load", {})))
            return cls(**value)
        except InvalidInput:
            raise
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise InvalidInput(f"not a worker record: {error}", "worker_info") from error


def _plain(part: Any) -> dict[str, Any]:
    return {field.name: getattr(part, field.name) for field in dataclasses.fields(part)}


def _checked(kind: type[Any], raw: Mapping[str, Any]) -> dict[str, Any]:
    """The known fields of ``raw``, those with a type of our own left to the caller."""
    if not isinstance(raw, dict):
        raise TypeError(f"{kind.__name__} is not an object")
    found: dict[str, Any] = {}
    for f in dataclasses.fields(kind):
        if f.name not in raw:
            continue
        value = found[f.name] = raw[f.name]
        match f.type:
            case "int" | "Epoch":
                fits = isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _MAX_COUNT
            case "bool":
                fits = isinstance(value, bool)
            case "str" | "WorkerId":
                fits = isinstance(value, str) and _is_text(value, f.name)
            case "dict[str, float]":
                fits = isinstance(value, dict) and len(value) <= _MAX_GAUGES and all(map(_is_gauge, value.items()))
            case _:
                fits = True
        if not fits:
            raise InvalidInput(f"not a worker record: {f.name} is {str(value)[:64]!r}", f"worker_info.{f.name}")
    return found


def _is_text(value: str, name: str) -> bool:
    if name in _TEXTS:  # a message is for people; whatever it is, it must be text that can be written
        return len(value) <= _MAX_TEXT_CHARS and not any("\ud800" <= c <= "\udfff" for c in value)
    return len(value) <= _MAX_NAME_CHARS and value.isprintable()


def _is_gauge(item: tuple[str, object]) -> bool:
    name, value = item
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return len(name) <= _MAX_NAME_CHARS and name.isprintable() and number and abs(value) < 1e300 and math.isfinite(value)  # type: ignore[arg-type]
