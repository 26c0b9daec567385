"""Which expert group holds which experts, layer by layer, redundant copies included (pure values; control speed).

A group is what one expert index of the FFN shards holds; tensor slices of a group hold slices of the same experts. The shared
expert is held by every group: it is computed where the row goes anyway. Must not know: tensors, workers, links.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from antiphon.core.errors import InvalidInput
from antiphon.core.ids import slice_bounds
from antiphon.models.config import DecoderConfig, MoEConfig


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
