"""Chooses where experts and their copies go, from how many rows each had: EPLB's global and hierarchical policies (control speed).

    copies:   again and again, one more for the expert with the most rows per copy
    packing:  copies in falling order of rows, each to the lightest group that has room and no copy of the same expert
    hierarchical: first whole expert groups to nodes (group-limited gates then stay within few nodes), then as above in each node

After DeepSeek's expert-parallel load balancer (arXiv 2412.19437 §3.4). Must not know: models, workers, tensors.
"""

from __future__ import annotations

from collections.abc import Sequence

from antiphon.core.errors import InvalidInput

Owners = tuple[tuple[int, ...], ...]  # groups of every expert, ascending


def balance(
    rows: Sequence[float], num_groups: int, num_redundant: int = 0, *, num_expert_groups: int = 1, num_nodes: int = 1
) -> Owners:
    """Groups of every expert.

    Args:
        rows: Rows of each expert, in any unit.
        num_groups: Groups of shards to spread over.
        num_redundant: Copies beyond the first, over all experts.
        num_expert_groups: Groups that the gate knows, contiguous runs of experts.
        num_nodes: Machines that the groups of shards are spread over, in contiguous runs.

    Raises:
        InvalidInput: the groups don't divide over the nodes, or there is nothing to spread.
    """
    if num_groups < 1 or num_nodes < 1 or num_groups % num_nodes:
        raise InvalidInput(f"{num_groups} groups don't divide over {num_nodes} nodes", "placement.nodes")
    if num_redundant < 0:
        raise InvalidInput("redundant copies can't be fewer than none", "placement.redundant")
    # Without traffic every expert counts the same, and a trace of weight keeps idle experts spread.
    floor = max(sum(rows), 1.0) * 1e-9
    weights = [max(float(count), floor) for count in rows]
    hierarchical = num_nodes > 1 and num_expert_groups % num_nodes == 0 and len(weights) % num_expert_groups == 0
    if not hierarchical:
        return _pack(weights, _copies(weights, num_groups, num_redundant), num_groups)
    size = len(weights) // num_expert_groups
    sums = [sum(weights[g * size : (g + 1) * size]) for g in range(num_expert_groups)]
    node_of = _pack(sums, [1] * num_expert_groups, num_nodes)
    per_node = num_groups // num_nodes
    owners: list[tuple[int, ...]] = [()] * len(weights)
    for node in range(num_nodes):
        experts = [e for e in range(len(weights)) if node_of[e // size] == (node,)]
        share = num_redundant * (node + 1) // num_nodes - num_redundant * node // num_nodes
        mine = [weights[e] for e in experts]
        for e, groups in zip(experts, _pack(mine, _copies(mine, per_node, share), per_node), strict=True):
            owners[e] = tuple(node * per_node + g for g in groups)
    return tuple(owners)


def imbalance(rows: Sequence[float], owners: Owners, num_groups: int) -> float:
    """Largest over mean rows of a group, copies of an expert sharing its rows equally."""
    loads = [0.0] * num_groups
    for count, groups in zip(rows, owners, strict=True):
        for group in groups:
            loads[group] += count / len(groups)
    total = sum(loads)
    return max(loads) * num_groups / total if total > 0 else 1.0


def _copies(weights: Sequence[float], num_groups: int, num_redundant: int) -> list[int]:
    copies = [1] * len(weights)
    for _ in range(num_redundant):
        open_to = [e for e in range(len(weights)) if copies[e] < num_groups]
        if not open_to:
            break  # every group holds everything
        copies[max(open_to, key=lambda e: (weights[e] / copies[e], -e))] += 1
    return copies


def _pack(weights: Sequence[float], copies: Sequence[int], num_groups: int) -> Owners:
    capacity = -(-sum(copies) // num_groups)
    loads, held = [0.0] * num_groups, [0] * num_groups
    owners: list[set[int]] = [set() for _ in weights]
    # First copies before the others at equal weight, so that every expert finds room.
    items = sorted((-weights[e] / copies[e], turn, e) for e in range(len(weights)) for turn in range(copies[e]))
    missing = len(weights)
    for load, turn, e in items:
        room = sum(capacity - count for count in held)
        if turn > 0 and room <= missing:
            continue  # what is left is for experts that have no place yet
        open_to = [g for g in range(num_groups) if held[g] < capacity and g not in owners[e]]
        if not open_to:
            continue  # only groups that hold it already have room: the copy would be of no use
        group = min(open_to, key=lambda g: (loads[g], g))
        missing -= not owners[e]
        owners[e].add(group)
        loads[group] -= load
        held[group] += 1
    return tuple(tuple(sorted(groups)) for groups in owners)
