"""Metrics as Prometheus text, with aliases (request speed: once per scrape).

OpenTelemetry refuses instrument names with a colon, and dashboards made for vLLM look for
``vllm:num_requests_waiting``. So an instrument has one name of ours, and an alias renders the same samples a second
time under the other name.

Must not know: which metrics exist.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.exposition import generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample

from antiphon.core.errors import InvalidInput

_NAME = re.compile(r"[a-zA-Z_:][a-zA-Z0-9_:]*")
_NOT_IN_NAMES = re.compile(r"[^a-zA-Z0-9:]+")


@dataclass(frozen=True, slots=True, kw_only=True)
class Alias:
    """A second name for an instrument's samples; ``labels`` renames labels (ours → theirs)."""

    name: str
    labels: Mapping[str, str] = field(default_factory=dict)


class PrometheusText:
    """Renders a registry with its aliases. Any thread may render; aliases are added while starting."""

    def __init__(self, *, process_metrics: bool = True) -> None:
        self.registry = CollectorRegistry()
        if process_metrics:
            ProcessCollector(registry=self.registry)
        self._aliases: dict[str, list[Alias]] = {}
        # The reader's collector hands its data over through a queue of its own; two scrapes at once would mix theirs.
        self._lock = threading.Lock()

    def add_alias(self, instrument: str, alias: Alias) -> None:
        """Render ``instrument`` (its OpenTelemetry name) under ``alias`` too; a second time changes nothing.

        Raises:
            InvalidInput: the alias or one of its labels is not a name Prometheus takes.
        """
        for name in (alias.name, *alias.labels.values()):
            if not _NAME.fullmatch(name):
                raise InvalidInput(f"{name!r} is not a Prometheus name", "alias")
        known = self._aliases.setdefault(_sanitized(instrument), [])
        if alias not in known:
            known.append(alias)

    def render(self) -> bytes:
        """The text of one scrape."""
        with self._lock:
            return generate_latest(_Aliased(self.registry, self._aliases))


class _Aliased(Collector):
    def __init__(self, registry: CollectorRegistry, aliases: Mapping[str, list[Alias]]) -> None:
        self._registry = registry
        self._aliases = aliases

    def collect(self) -> Iterator[Metric]:
        for family in self._registry.collect():
            yield family
            # The exporter appends the unit to the instrument's name, and nothing else.
            plain = family.name.removesuffix(f"_{family.unit}") if family.unit else family.name
            for name in {family.name, plain}:
                for alias in self._aliases.get(name, ()):
                    yield _renamed(family, alias)


def _renamed(family: Metric, alias: Alias) -> Metric:
    base = alias.name.removesuffix("_total") if family.type == "counter" else alias.name
    renamed = Metric(base, family.documentation, family.type)
    renamed.samples = [
        Sample(
            base + sample.name.removeprefix(family.name),
            {alias.labels.get(key, key): value for key, value in sample.labels.items()},
            sample.value,
            sample.timestamp,
            sample.exemplar,
        )
        for sample in family.samples
    ]
    return renamed


def _sanitized(instrument: str) -> str:
    return _NOT_IN_NAMES.sub("_", instrument).removesuffix("_total")
