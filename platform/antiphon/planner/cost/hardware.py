"""Accelerators: what a card computes, reads, holds, sends and costs, and the file that lists them (control speed).

Bandwidths of links are per card and direction. Must not know: models.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from antiphon.core.document.yaml import load_yaml
from antiphon.core.errors import InvalidInput, SpecInvalid
from antiphon.planner.bounds import number, read_text
from antiphon.planner.cost.formats import BYTES_PER_VALUE, FALLBACK
from antiphon.planner.cost.formula import formula


@dataclass(frozen=True, slots=True, kw_only=True)
class Accelerator:
    """One kind of card."""

    key: str
    title: str
    flops: Mapping[str, float]  # flop/s by number format, dense
    memory_bytes: float
    bandwidth: float  # byte/s, memory
    scale_up_bandwidth: float  # byte/s to cards of the same node
    nic_bandwidth: float  # byte/s to other nodes
    cards_per_node: int = 8  # reached over scale_up_bandwidth
    mma_rows: int = 16  # rows of its smallest matrix product; fewer queries that share a KV head cost as many
    usd_per_hour: float | None = None  # None = unknown
    source: str = ""

    def compute_format(self, wanted: str) -> str:
        """``wanted``, or the format it computes in instead.

        Raises:
            InvalidInput: it has neither.
        """
        name = wanted
        while name not in self.flops:
            if name not in FALLBACK:
                raise InvalidInput(f"{self.key} computes neither in {wanted} nor in a wider format", "hardware")
            name = FALLBACK[name]
        return name

    def flops_in(self, wanted: str) -> float:
        """Peak flop/s in ``wanted`` or the format it computes in instead."""
        return self.flops[self.compute_format(wanted)]

    def priced(self, usd_per_hour: float | None) -> Accelerator:
        """The same card at another price; None keeps the price."""
        return self if usd_per_hour is None else dataclasses.replace(self, usd_per_hour=usd_per_hour)

    def __hash__(self) -> int:
        return hash(self.key)


@dataclass(frozen=True, slots=True, kw_only=True)
class Efficiency:
    """Shares of the peaks that are reached, and fixed costs; ``antiphon plan calibrate`` fits them to what was measured."""

    compute: float = 0.6  # products with weights: what tuned FP8 products reach at decode sizes
    attention: float = 0.75  # FlashAttention-3's 740 of 989 Tflop/s (arXiv 2407.08608)
    memory: float = 0.75  # weight reads
    kv: float = 0.9  # FlashMLA's 3,000 of 3,350 GB/s on H800
    network: float = 0.8  # DeepEP's 40 of 50 GB/s on H800
    # Of the shorter of computing and exchanging on the same cards, hidden by two ubatches: kernels that send and receive take the
    # card from those that compute. 25.5 % were published for the whole gain on 72 H100 (LMSYS, large-scale EP, 2025-05-05).
    overlap: float = 0.65
    kernel_s: float = 3e-6  # launch, ramp and drain of one kernel in a captured graph
    link_latency_s: float = 1e-5  # first byte and its flag, one way

    @classmethod
    def ideal(cls) -> Efficiency:
        """Peaks, and nothing fixed: what published cost tables assume."""
        return cls(compute=1.0, attention=1.0, memory=1.0, kv=1.0, network=1.0, overlap=1.0, kernel_s=0.0, link_latency_s=0.0)

    def with_values(self, values: Mapping[str, float | None], where: str = "efficiency") -> Efficiency:
        """With the values given; None keeps one.

        Raises:
            InvalidInput: a name is unknown, or a value is out of its bounds.
        """
        names = [one.name for one in dataclasses.fields(self)]
        given = {}
        for name, value in values.items():
            if name not in names:
                raise InvalidInput(f"{where}: unknown {str(name)[:64]!r}; expected {', '.join(names)}", where)
            if value is not None:
                kind = "fixed_s" if name.endswith("_s") else "overlap" if name == "overlap" else "share"
                given[name] = number(value, kind, f"{where}.{name}")
        return dataclasses.replace(self, **given)


@formula("usd/flop", usd_per_s="usd/card/s", flops="flop/card/s")
def usd_per_flop(*, usd_per_s: float, flops: float) -> float:
    """Price of one operation at full use."""
    return usd_per_s / flops


@formula("usd/byte", usd_per_s="usd/card/s", bandwidth="byte/card/s")
def usd_per_byte(*, usd_per_s: float, bandwidth: float) -> float:
    """Price of one byte of memory traffic at full use."""
    return usd_per_s / bandwidth


@formula("flop/byte", flops="flop/card/s", bandwidth="byte/card/s")
def roofline(*, flops: float, bandwidth: float) -> float:
    """Operations a card can do per byte it reads."""
    return flops / bandwidth


@dataclass(frozen=True, slots=True)
class Catalogue:
    """The accelerators known to one plan."""

    accelerators: Mapping[str, Accelerator] = field(default_factory=dict)

    @classmethod
    def built_in(cls) -> Catalogue:
        """The file that ships with the planner."""
        text = resources.files("antiphon.planner").joinpath("data", "accelerators.json").read_text()
        return cls().extended(json.loads(text))

    def extended(self, entries: Mapping[str, Any]) -> Catalogue:
        """With further entries; those of a known key replace it, and may give only the fields that differ.

        Raises:
            InvalidInput: an entry lacks a field or has a wrong one.
        """
        accelerators = dict(self.accelerators)
        for key, entry in entries.items():
            accelerators[key] = _parse(key, entry, accelerators.get(key))
        return Catalogue(accelerators)

    def including(self, card: Accelerator) -> Catalogue:
        """With one more accelerator."""
        return Catalogue({**self.accelerators, card.key: card})

    def with_file(self, path: Path) -> Catalogue:
        """With the entries of a JSON or YAML file.

        Raises:
            InvalidInput: the file can't be read or is wrong.
        """
        text = read_text(path, "hardware_file")
        try:
            documents = load_yaml(text, str(path))
        except SpecInvalid as error:
            raise InvalidInput(f"{path}: {error}", "hardware_file") from error
        entries = documents[0].value if len(documents) == 1 else None
        if not isinstance(entries, Mapping):
            raise InvalidInput(f"{path}: must map names of accelerators to their figures", "hardware_file")
        return self.extended(entries)

    def get(self, key: str, field: str = "hardware") -> Accelerator:
        """The accelerator called ``key``; ``field`` is what named it.

        Raises:
            InvalidInput: there is none.
        """
        try:
            return self.accelerators[key]
        except KeyError:
            known = ", ".join(self.accelerators)
            raise InvalidInput(f"{field}: no accelerator {key!r}; known are {known}, and local", field) from None

    @property
    def priced(self) -> tuple[Accelerator, ...]:
        """Those with a price."""
        return tuple(card for card in self.accelerators.values() if card.usd_per_hour is not None)


def _parse(key: str, entry: Any, known: Accelerator | None) -> Accelerator:
    where = f"hardware.{key}"
    if not isinstance(key, str):
        raise InvalidInput(f"{where}: a name must be text; quote it", where)
    if not isinstance(entry, Mapping):
        raise InvalidInput(f"{where}: must be a mapping", where)
    fields = {f.name for f in dataclasses.fields(Accelerator)} - {"key"}
    for name in entry:
        if name not in fields:
            raise InvalidInput(f"{where}: unknown field {name!r}; expected {', '.join(sorted(fields))}", where)
    merged: dict[str, Any] = {} if known is None else {f: getattr(known, f) for f in fields}
    merged.update(entry)
    merged.setdefault("title", key)
    for name in ("title", "source"):
        if not isinstance(merged.get(name, ""), str):
            raise InvalidInput(f"{where}.{name}: must be text", where)
    flops = merged.get("flops")
    if not isinstance(flops, Mapping) or not flops or not set(flops) <= set(BYTES_PER_VALUE):
        raise InvalidInput(f"{where}.flops: must map number formats ({', '.join(BYTES_PER_VALUE)}) to flop/s", where)
    merged["flops"] = {name: _positive(f"{where}.flops.{name}", value) for name, value in flops.items()}
    for name in ("memory_bytes", "bandwidth", "scale_up_bandwidth", "nic_bandwidth"):
        merged[name] = _positive(f"{where}.{name}", merged.get(name))
    merged["cards_per_node"] = max(1, min(1_000_000, int(_positive(f"{where}.cards_per_node", merged.get("cards_per_node", 8)))))
    merged["mma_rows"] = min(1024, int(_positive(f"{where}.mma_rows", merged.get("mma_rows", 16))) or 1)
    if merged.get("usd_per_hour") is not None:
        merged["usd_per_hour"] = _positive(f"{where}.usd_per_hour", merged["usd_per_hour"])
    return Accelerator(key=key, **merged)


def _positive(where: str, value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        raise InvalidInput(f"{where}: {str(value)[:64]!r} is not a number", where) from None
    if isinstance(value, bool) or not number > 0:
        raise InvalidInput(f"{where}: must be above 0, is {value}", where)
    if not 1e-9 <= number <= 1e24:  # far beyond any card, and no sum of them overflows
        raise InvalidInput(f"{where}: must be from 1e-09 to 1e+24, is {number:g}", where)
    return number
