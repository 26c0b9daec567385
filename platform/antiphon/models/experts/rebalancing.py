"""Whether and how a placement should change, from the rows that experts had (pure; control speed).

    rows since the last look ──decide()──► a better placement, or None ──stages()──► steps of bounded memory

A layer changes only where its busiest group is well above the mean and balancing makes it clearly better (hysteresis: a load that
merely flickers moves nothing). Groups are interchangeable, so a new layer's groups are numbered to keep what they hold.
Must not know: workers, links, tensors.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from antiphon.models.config import DecoderConfig, MoEConfig
from antiphon.models.experts.balance import Owners, balance, imbalance
from antiphon.models.experts.placement import ExpertPlacement

Rows = Mapping[int, Sequence[int]]  # by layer number on the wire: rows of each routed expert; further entries are left out


@dataclass(frozen=True, slots=True, kw_only=True)
class BalancePolicy:
    """When a layer is worth balancing again."""

    threshold: float = 1.15  # busiest group over mean from which a layer is looked at
    min_gain: float = 0.05  # of that quotient, below which nothing moves
    min_rows: int = 2000  # of a layer, below which its counts say too little
    num_redundant: int = 0  # copies beyond the first, per layer
    num_nodes: int = (
        1  # machines that the groups are spread over in contiguous runs; more than one asks for the hierarchical policy
    )


def decide(config: DecoderConfig, current: ExpertPlacement, rows: Rows, policy: BalancePolicy) -> ExpertPlacement | None:
    """The placement that ``rows`` ask for; None where nothing is worth moving.

    Raises:
        InvalidInput: the groups don't divide over the policy's nodes.
    """
    layers = list(current.groups)
    for number, ffn in enumerate(config.ffns):
        if not isinstance(ffn, MoEConfig) or number not in rows:
            continue
        counts = list(rows[number])[: ffn.gate.num_experts]
        if sum(counts) < max(1, policy.min_rows):
            continue
        before = imbalance(counts, current.groups[number], current.num_groups)
        if before < policy.threshold:
            continue
        owners = balance(
            counts,
            current.num_groups,
            policy.num_redundant,
            num_expert_groups=ffn.gate.num_groups,
            num_nodes=policy.num_nodes,
        )
        if before - imbalance(counts, owners, current.num_groups) < policy.min_gain:
            continue
        layers[number] = owners if policy.num_nodes > 1 else renumbered(owners, current.groups[number], current.num_groups)
    changed = ExpertPlacement(num_groups=current.num_groups, groups=tuple(layers))
    return None if changed == current else changed


def renumbered(owners: Owners, held: Owners, num_groups: int) -> Owners:
    """``owners`` with its groups numbered anew so that they keep most of what they held; the load of each stays as it is."""
    overlap = {
        (new, old): sum(new in wants and old in has for wants, has in zip(owners, held, strict=True))
        for new in range(num_groups)
        for old in range(num_groups)
    }
    number_of: dict[int, int] = {}
    # Most in common first; a group that has found its number, and a number that is given, drop out.
    for new, old in sorted(overlap, key=lambda pair: (-overlap[pair], pair[0] != pair[1], pair)):
        if new not in number_of and old not in number_of.values():
            number_of[new] = old
    return tuple(tuple(sorted(number_of[group] for group in groups)) for groups in owners)


def stages(
    config: DecoderConfig,
    current: ExpertPlacement,
    target: ExpertPlacement,
    itemsize_bytes: int,
    num_tensor: int,
    max_extra_bytes: int,
) -> Iterator[ExpertPlacement]:
    """Placements on the way to ``target``, the last of them.

    From one to the next no worker reads more than ``max_extra_bytes`` of experts, or one layer's where that alone is more, so that
    while both are held a worker never needs more beyond its share.

    Args:
        config: The model.
        current: The placement in use.
        target: The one wanted, over as many groups.
        itemsize_bytes: Of a weight as it is held.
        num_tensor: Slices that each group's experts are cut into.
        max_extra_bytes: The bound, per worker.
    """
    layers = list(current.groups)
    read = [0] * target.num_groups
    moved = False
    for number, ffn in enumerate(config.ffns):
        if not isinstance(ffn, MoEConfig) or layers[number] == target.groups[number]:
            continue
        expert_bytes = 3 * config.hidden_size * -(-ffn.intermediate_size // num_tensor) * itemsize_bytes
        pairs = zip(layers[number], target.groups[number], strict=True)
        adds = [0] * target.num_groups
        for has, wants in pairs:
            for group in set(wants) - set(has):
                adds[group] += expert_bytes
        if moved and any(done + more > max_extra_bytes for done, more in zip(read, adds, strict=True)):
            yield ExpertPlacement(num_groups=target.num_groups, groups=tuple(layers))
            read = [0] * target.num_groups
        layers[number] = target.groups[number]
        read = [done + more for done, more in zip(read, adds, strict=True)]
        moved = True
    if moved:
        yield ExpertPlacement(num_groups=target.num_groups, groups=tuple(layers))


def since(now: Rows, before: Rows) -> dict[int, list[int]]:
    """Rows since ``before``; a count that fell (a worker restarted and counts anew) counts whole."""
    found: dict[int, list[int]] = {}
    for number, counts in now.items():
        past = list(before.get(number, ()))
        past += [0] * (len(counts) - len(past))
        found[number] = [count - gone if count >= gone else count for count, gone in zip(counts, past, strict=False)]
    return found
