"""What one worker process is told when it starts, and how that travels from its supervisor (control speed).

The supervisor writes the configuration to a file and names it in the environment; the worker reads it once, with
``WorkerConfig.from_environment()``. Must not know: how the worker computes, torch, or Ray.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from antiphon.apps.tiers.plan import TierPool
from antiphon.core.document.pools import PoolSpec
from antiphon.core.document.spec import LLMDeploymentSpec
from antiphon.core.errors import InvalidInput
from antiphon.core.ids import Epoch, FFNShard, Role, WorkerId

CONFIG_VARIABLE = "ANTIPHON_WORKER_CONFIG"  # the JSON itself, or the path of a file that holds it

LogFormat = Literal["text", "json"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LogSettings:
    """How a process logs: ``level`` in Python's words (DEBUG, INFO, ...), ``format`` for people or for machines."""

    level: str = "INFO"
    format: LogFormat = "text"


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerConfig:
    """One worker's whole configuration. ``index`` and ``epoch`` are claimed in the directory before it starts."""

    deployment: str
    model: str  # the name that clients send
    revision: str  # hash of what peers must agree on; peers pair only within one revision
    checkpoint: str  # directory
    role: Role
    pool: str
    index: int
    epoch: Epoch
    spec: LLMDeploymentSpec
    directory: str  # address for gateway.directory.open_directory
    host: str = "127.0.0.1"  # bound and advertised
    shard: FFNShard = field(default_factory=FFNShard)
    threads: int = 1
    cores: tuple[int, ...] = ()  # processors the process is pinned to; empty = not pinned
    card: str = (
        ""  # the one card that the process may see; "" = whatever its environment says, which is Ray's to write on a cluster
    )
    drain_s: float = 5.0  # after SIGTERM: time for requests in flight, then exit
    log: LogSettings = field(default_factory=LogSettings)
    tier_pool: TierPool | None = None  # the experts that this process serves together; None = its own model alone
    document_revision: str = ""  # see WorkerInfo

    @property
    def worker_id(self) -> WorkerId:
        """Stable over restarts."""
        return worker_id(self.deployment, self.pool, self.index)

    @property
    def shares_cores(self) -> bool:
        """Whether other workers are pinned to some of the same processors."""
        return not self.spec.shared_cores.isdisjoint(self.cores)

    @property
    def pool_spec(self) -> PoolSpec:
        """The worker's own pool in the document."""
        return next(pool for pool in self.spec.pools if pool.name == self.pool)

    def to_json(self) -> str:
        """The wire form; round-trips through ``from_json``."""
        value = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        value["role"] = self.role.value
        value["spec"] = self.spec.model_dump(mode="json", by_alias=True)
        value["shard"] = dataclasses.asdict(self.shard)
        value["log"] = dataclasses.asdict(self.log)
        value["tier_pool"] = None if self.tier_pool is None else self.tier_pool.to_value()
        return json.dumps(value, indent=1)

    @classmethod
    def from_json(cls, text: str | bytes) -> WorkerConfig:
        """Parse the wire form.

        Raises:
            InvalidInput: the text is not a worker's configuration.
        """
        try:
            raw = json.loads(text)
            raw["role"] = Role(raw["role"])
            raw["spec"] = LLMDeploymentSpec.model_validate_json(json.dumps(raw["spec"]))
            raw["shard"] = FFNShard(**raw["shard"])
            raw["log"] = LogSettings(**raw["log"])
            raw["cores"] = tuple(raw["cores"])
            raw["tier_pool"] = None if raw.get("tier_pool") is None else TierPool.from_value(raw["tier_pool"])
            return cls(**raw)
        except (ValueError, TypeError, KeyError) as error:
            raise InvalidInput(f"not a worker configuration: {error}", CONFIG_VARIABLE) from error

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> WorkerConfig:
        """The configuration that the supervisor left for this process.

        Raises:
            InvalidInput: there is none, or it can't be parsed.
        """
        value = environment.get(CONFIG_VARIABLE)
        if value is None:
            raise InvalidInput(f"{CONFIG_VARIABLE} is not set; workers are started by their supervisor", CONFIG_VARIABLE)
        if value.lstrip().startswith("{"):
            return cls.from_json(value)
        try:
            return cls.from_json(Path(value).read_bytes())
        except OSError as error:
            raise InvalidInput(f"can't read {value}: {error}", CONFIG_VARIABLE) from error


def worker_id(deployment: str, pool: str, index: int) -> WorkerId:
    """The id of worker ``index`` of a pool."""
    return WorkerId(f"{deployment}/{pool}/{index}")
