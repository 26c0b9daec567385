"""How a step is cut into ubatches and in which order its halves run: plain data from pure functions (step speed).

With m ubatches the attention side computes ubatch u+1 while u's rows are away. For two layers and two ubatches:

    attend(0,0) attend(0,1) | combine(0,0) attend(1,0) | combine(0,1) attend(1,1) | combine(1,0) | combine(1,1)

Rows of one prompt may fall into several ubatches: within a layer the ubatches run in order, so a later one finds the earlier
one's K and V in the cache. Must not know: tensors, links.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass


class Half(enum.Enum):
    """What one operation of the plan does."""

    ATTEND = "attend"  # attention half of (layer, ubatch), rows go out
    COMBINE = "combine"  # the FFN's answer for (layer, ubatch) is awaited and added


@dataclass(frozen=True, slots=True, kw_only=True)
class Op:
    """One operation of a step's plan."""

    half: Half
    layer: int
    ubatch: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """Consecutive new tokens of one request: rows of a step."""

    request: int  # position in the step's batch
    first_token: int
    num_tokens: int


def plan_ops(num_layers: int, num_ubatches: int) -> tuple[Op, ...]:
    """The order of a step; each COMBINE comes right before the next ATTEND of its ubatch."""
    ops = [Op(half=Half.ATTEND, layer=0, ubatch=u) for u in range(num_ubatches)]
    for layer in range(num_layers):
        for u in range(num_ubatches):
            ops.append(Op(half=Half.COMBINE, layer=layer, ubatch=u))
            if layer + 1 < num_layers:
                ops.append(Op(half=Half.ATTEND, layer=layer + 1, ubatch=u))
    return tuple(ops)


def split_segments(segments: Sequence[Segment], num_ubatches: int, min_rows: int = 1) -> list[list[Segment]]:
    """Cut the rows into at most ``num_ubatches`` runs of near-equal row counts, none of fewer than ``min_rows`` rows.

    The order of rows is kept; a segment may be cut.
    """
    total = sum(segment.num_tokens for segment in segments)
    parts = max(1, min(num_ubatches, total // max(1, min_rows)))
    result: list[list[Segment]] = []
    pending = list(reversed(segments))
    for part in range(parts):
        room = total * (part + 1) // parts - total * part // parts
        run: list[Segment] = []
        while room > 0:
            segment = pending.pop()
            taken = min(segment.num_tokens, room)
            run.append(Segment(request=segment.request, first_token=segment.first_token, num_tokens=taken))
            if taken < segment.num_tokens:
                pending.append(
                    Segment(
                        request=segment.request,
                        first_token=segment.first_token + taken,
                        num_tokens=segment.num_tokens - taken,
                    )
                )
            room -= taken
        result.append(run)
    return result
