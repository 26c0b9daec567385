"""Which expert group holds which experts, layer by layer, redundant copies included (pure values; control speed).

A group is what one expert index of the FFN shards holds; tensor slices of a group hold slices of the same experts. The shared
expert is held by every group: it is computed where the row goes anyway. Must not know: tensors, workers, links.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from antiphon.core.errors import InvalidInput
from antiphon.core.ids import slice_bounds
from antiphon.core.text.json_text import read_json_text
from antiphon.models.config import DecoderConfig, MoEConfig
from antiphon.models.experts.balance import Owners, balance

_FORMAT = "antiphon-expert-placement-1"


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertPlacement:
    """Groups of every expert: ``groups[number][expert]``, ascending; an empty layer is a dense FFN."""

    num_groups: int
    groups: tuple[tuple[tuple[int, ...], ...], ...]

    @classmethod
    def spread(cls, config: DecoderConfig, num_groups: int) -> ExpertPlacement:
        """Every expert once, in contiguous runs of near-equal length."""
        layers: list[tuple[tuple[int, ...], ...]] = []
        for ffn in config.ffns:
            owners: list[tuple[int, ...]] = []
            if isinstance(ffn, MoEConfig):
                for group in range(num_groups):
                    low, high = slice_bounds(ffn.gate.num_experts, group, num_groups)
                    owners += [(group,)] * (high - low)
            layers.append(tuple(owners))
        return cls(num_groups=num_groups, groups=tuple(layers))

    @classmethod
    def balanced(
        cls,
        config: DecoderConfig,
        rows: Mapping[int, Sequence[float]],
        num_groups: int,
        num_redundant: int = 0,
        num_nodes: int = 1,
    ) -> ExpertPlacement:
        """Every layer balanced by the rows its experts had.

        Args:
            config: The model.
            rows: By layer number on the wire, rows of each routed expert (further entries are left out); layers that are not
                there count as even.
            num_groups: Groups of shards.
            num_redundant: Copies beyond the first, per layer.
            num_nodes: Machines that the groups are spread over; more than one asks for the hierarchical policy.

        Raises:
            InvalidInput: the groups don't divide over the nodes.
        """
        layers: list[Owners] = []
        for number, ffn in enumerate(config.ffns):
            if isinstance(ffn, MoEConfig):
                gate = ffn.gate
                counts = list(rows.get(number, ()))[: gate.num_experts] or [1.0] * gate.num_experts
                layers.append(balance(counts, num_groups, num_redundant, num_expert_groups=gate.num_groups, num_nodes=num_nodes))
            else:
                layers.append(())
        return cls(num_groups=num_groups, groups=tuple(layers))

    @classmethod
    def load(cls, path: Path, config: DecoderConfig) -> ExpertPlacement:
        """Read a placement file.

        Raises:
            InvalidInput: it is none, or is for another model.
        """
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise InvalidInput(f"{path}: not a placement file: {error!r}", "placement") from error
        return cls.from_json(text, config, str(path))

    @classmethod
    def from_json(cls, text: str, config: DecoderConfig, source: str = "placement") -> ExpertPlacement:
        """Parse what ``to_json`` gives; ``source`` names it in errors.

        Raises:
            InvalidInput: it is none, or is for another model.
        """
        try:
            raw = read_json_text(text, unique_keys=True)
            if raw["format"] != _FORMAT:
                raise InvalidInput(f"{source}: format {raw['format']!r}, expected {_FORMAT!r}", "placement")
            groups = tuple(tuple(tuple(int(g) for g in held) for held in layer) for layer in raw["groups"])
            placement = cls(num_groups=int(raw["numGroups"]), groups=groups)
            made_for = raw["model"]
        except (ValueError, KeyError, TypeError, OverflowError) as error:
            raise InvalidInput(f"{source}: not a placement file: {error!r}", "placement") from error
        if made_for != config.fingerprint:
            raise InvalidInput(f"{source}: made for model {made_for}, this one is {config.fingerprint}", "placement")
        placement.check(config)
        return placement

    def to_json(self, config: DecoderConfig) -> str:
        """The file's content, one line; it names the model it is for."""
        raw = {"format": _FORMAT, "model": config.fingerprint, "numGroups": self.num_groups, "groups": self.groups}
        return json.dumps(raw, separators=(",", ":"))

    def save(self, path: Path, config: DecoderConfig) -> None:
        """Write a placement file; readers see the old one or the new one, never half of it."""
        beside = path.with_name(f".{path.name}.{os.getpid()}")
        beside.write_text(self.to_json(config) + "\n", encoding="utf-8")
        beside.replace(path)

    def check(self, config: DecoderConfig) -> None:
        """Check that this places every expert of ``config``.

        Raises:
            InvalidInput: it does not, or names a group that is not there.
        """
        if len(self.groups) != len(config.ffns):
            raise InvalidInput(f"a placement of {len(self.groups)} layers for a model of {len(config.ffns)}", "placement")
        for number, (owners, ffn) in enumerate(zip(self.groups, config.ffns, strict=True)):
            expected = ffn.gate.num_experts if isinstance(ffn, MoEConfig) else 0
            if len(owners) != expected:
                raise InvalidInput(f"layer {number} places {len(owners)} experts, the model has {expected}", "placement")
            for expert, held_by in enumerate(owners):
                if not held_by or sorted(set(held_by)) != list(held_by) or held_by[0] < 0 or held_by[-1] >= self.num_groups:
                    raise InvalidInput(f"layer {number}, expert {expert}: groups {list(held_by)}", "placement")

    def held(self, moe: MoEConfig, number: int, group: int) -> Sequence[int]:
        """Ids that ``group`` holds of layer ``number``, which is ``moe``; the shared expert's, if it has one, is the last."""
        ids = [expert for expert, held_by in enumerate(self.groups[number]) if group in held_by]
        return [*ids, moe.gate.num_experts] if moe.shared_intermediate_size else ids
