"""One decode group: x attention cards and y FFN cards (or the same cards for both) at a batch, and the best batch (control speed).

Must not know: how many groups there are, prefill pools, or prices.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from antiphon.planner.cost.formats import bytes_per_value
from antiphon.planner.cost.formula import Apply, Derivation, formula, plainly
from antiphon.planner.cost.model_cost import cache_bytes
from antiphon.planner.cost.shape import Layer
from antiphon.planner.pipeline.barrier import expected_max, slowest_context
from antiphon.planner.pipeline.fabric import Exchange, exchange
from antiphon.planner.pipeline.speculation import NO_SPECULATION, Speculation
from antiphon.planner.pipeline.stages import NO_PROMPTS, PromptRows, Roofline
from antiphon.planner.pipeline.ubatches import StageTimes, min_ubatches, step_s

MAX_ROWS = 1 << 20


@formula("byte", weights="value", weight_bytes="byte/value", rows="row", cache_bytes="byte/row", buffer_bytes="byte/row")
def attention_memory(*, weights: float, weight_bytes: float, rows: float, cache_bytes: float, buffer_bytes: float) -> float:
    """Memory of an attention card: its part of the weights, KV of its rows, exchange buffers."""
    return weights * weight_bytes + rows * (cache_bytes + buffer_bytes)


@formula("byte/card", weights="value", weight_bytes="byte/value", num_cards="card", buffers="byte/card")
def ffn_memory(*, weights: float, weight_bytes: float, num_cards: float, buffers: float) -> float:
    """Memory of an FFN card: its shard of the weights, exchange buffers."""
    return weights * weight_bytes / num_cards + buffers


@formula("row/s", num_ranks="", num_ubatches="", rows="row", step_s="s")
def group_rate(*, num_ranks: float, num_ubatches: float, rows: float, step_s: float) -> float:
    """Decoded tokens per second of a group: every row of every attention rank, once per step."""
    return num_ranks * num_ubatches * rows / step_s


@formula("s", num_ubatches="", compute_s="s", exchange_s="s", overlap="")
def shared_layer_s(*, num_ubatches: float, compute_s: float, exchange_s: float, overlap: float) -> float:
    """A layer on cards that do both halves: the shorter of computing and exchanging is hidden in part by the other ubatches."""
    return num_ubatches * (compute_s + exchange_s - overlap * min(compute_s, exchange_s))


@dataclass(frozen=True, slots=True, kw_only=True)
class Contexts:
    """What decode rows see: mean and standard deviation over rows, in tokens; the prompt rows that come with each."""

    mean: float
    deviation: float = 0.0
    prompt_rows_per_decode_row: float = 0.0  # colocated only: prompts share the step
    prompt: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """How a group is cut. Colocated: the same ``num_attention`` == ``num_ffn`` cards do both halves.

    ``tensor`` attention cards make a rank: they share its heads and have the same rows.
    """

    num_attention: int
    num_ffn: int
    num_ubatches: int
    colocated: bool = False
    tensor: int = 1

    @property
    def num_ranks(self) -> int:
        """Attention ranks, each with rows of its own."""
        return self.num_attention // self.tensor

    @property
    def num_cards(self) -> int:
        """Cards of the group."""
        return self.num_attention if self.colocated else self.num_attention + self.num_ffn

    @property
    def name(self) -> str:
        """xAyF, or n cards; TPn when n cards share an attention."""
        shared = "" if self.tensor == 1 else f" TP{self.tensor}"
        return (f"{self.num_attention}C" if self.colocated else f"{self.num_attention}A{self.num_ffn}F") + shared


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerTimes:
    """Stage times of one kind of layer for one ubatch."""

    layer: Layer
    count: int
    times: StageTimes
    exchange: Exchange


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupPoint:
    """A group at a batch."""

    layout: Layout
    rows: int  # per attention rank and ubatch: one of each request, drafts left out
    step_s: float
    tokens_per_s: float
    kinds: tuple[LayerTimes, ...]
    head_s: float
    attention_bytes: float  # memory per attention card
    ffn_bytes: float  # memory per FFN card; colocated: the same card's total
    limit: str  # why the batch is not larger: tpot, memory, rows, or prefill (as many cards as the budget leaves)
    speculation: Speculation = NO_SPECULATION

    @property
    def computed_rows(self) -> int:
        """Rows per attention rank and ubatch, drafts included."""
        return self.rows * self.speculation.rows

    @property
    def rows_per_ffn_ubatch(self) -> int:
        """Rows that meet at the FFN, drafts included."""
        return self.computed_rows * self.layout.num_ranks

    @property
    def tpot_s(self) -> float:
        """Mean seconds between two tokens of a request."""
        return self.step_s / self.speculation.tokens()

    @property
    def batch(self) -> int:
        """Requests running on one attention rank."""
        return self.rows * self.layout.num_ubatches

    @property
    def main(self) -> LayerTimes:
        """The most frequent kind of layer."""
        return self.kinds[-1]


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeModel:
    """Evaluates groups of one model on given cards under given contexts."""

    stages: Roofline
    contexts: Contexts
    memory_share: float = 0.9  # of a card's memory that weights and KV may take
    memory_sigmas: float = 3.0  # KV is sized for this many standard deviations above the mean
    speculation: Speculation = NO_SPECULATION

    def usable_attention_bytes(self) -> float:
        """Memory to use on an attention card."""
        return self.stages.attention.memory_bytes * self.memory_share

    def usable_ffn_bytes(self) -> float:
        """Memory to use on an FFN card."""
        return self.stages.ffn.memory_bytes * self.memory_share

    def memory(self, layout: Layout, rows: float, apply: Apply = plainly) -> tuple[float, float]:
        """Bytes on an attention card and on an FFN card; colocated cards hold both, given twice."""
        shape, formats = self.stages.shape, self.stages.formats
        batch = rows * layout.num_ubatches
        context = slowest_context(
            mean=self.contexts.mean, deviation=self.contexts.deviation, rows=batch, slowest=self.memory_sigmas
        )
        weight_bytes = bytes_per_value(formats.weights)
        row_buffers = shape.hidden_size * (bytes_per_value(formats.a2f) + bytes_per_value(formats.f2a)) * self.speculation.rows
        attention = apply(
            attention_memory,
            weights=shape.attention_side_weights / layout.tensor,
            weight_bytes=weight_bytes,
            rows=batch,
            cache_bytes=cache_bytes(shape, formats, context, layout.tensor),
            buffer_bytes=row_buffers,
        )
        ffn = apply(
            ffn_memory,
            weights=shape.ffn_weights,
            weight_bytes=weight_bytes,
            num_cards=layout.num_ffn,
            buffers=batch * layout.num_ranks * row_buffers / layout.num_ffn,
        )
        return (attention + ffn, attention + ffn) if layout.colocated else (attention, ffn)

    def fits(self, layout: Layout, rows: float) -> bool:
        """True when both kinds of card hold what they must."""
        attention, ffn = self.memory(layout, rows)
        if layout.colocated:
            return attention <= min(self.usable_attention_bytes(), self.usable_ffn_bytes())
        return attention <= self.usable_attention_bytes() and ffn <= self.usable_ffn_bytes()

    def layer_times(self, layout: Layout, rows: float, apply: Apply = plainly) -> tuple[LayerTimes, ...]:
        """Stage times of every kind of layer, barriers and imbalance in."""
        stages, contexts = self.stages, self.contexts
        efficiency = stages.efficiency
        context = apply(
            slowest_context,
            mean=contexts.mean,
            deviation=contexts.deviation,
            rows=rows,
            slowest=expected_max(layout.num_ranks),
        )
        prompts = NO_PROMPTS
        if contexts.prompt_rows_per_decode_row:
            arriving = contexts.prompt_rows_per_decode_row * self.speculation.tokens()
            prompts = PromptRows(rows=rows * arriving, prompt=contexts.prompt)
        computed = rows * self.speculation.rows
        all_rows = (computed + prompts.rows) * layout.num_ranks
        kinds = []
        for layer, count in stages.shape.kinds:
            moved = exchange(
                layer.ffn,
                stages.shape.hidden_size,
                stages.formats,
                rows=all_rows,
                attention=stages.attention,
                num_attention=layout.num_attention,
                ffn_card=stages.ffn,
                num_ffn=layout.num_ffn,
                colocated=layout.colocated,
                network_efficiency=efficiency.network,
                latency_s=efficiency.link_latency_s,
                tensor=layout.tensor,
                apply=apply,
            )
            times = StageTimes(
                attention_s=stages.attention_s(layer, computed, context, prompts, apply, layout.tensor),
                a2f_s=moved.a2f_s,
                ffn_s=stages.ffn_s(layer.ffn, all_rows, layout.num_ffn, apply),
                f2a_s=moved.f2a_s,
            )
            kinds.append(LayerTimes(layer=layer, count=count, times=times, exchange=moved))
        return tuple(kinds)

    def step(self, layout: Layout, rows: float, apply: Apply = plainly) -> tuple[float, tuple[LayerTimes, ...], float]:
        """Seconds of a decode step, its layers, and the LM head's part."""
        kinds = self.layer_times(layout, rows, apply)
        head = self.stages.head_s(rows * self.speculation.rows * layout.num_ubatches, apply, layout.tensor)
        slower = 1 + self.speculation.drafting
        if not layout.colocated:
            return slower * (step_s([(kind.times, kind.count) for kind in kinds], layout.num_ubatches) + head), kinds, head
        total = 0.0
        for kind in kinds:
            total += kind.count * apply(
                shared_layer_s,
                num_ubatches=layout.num_ubatches,
                compute_s=kind.times.attention_s + kind.times.ffn_s,
                # Every card sends and receives in both directions' phases: out and back follow each other.
                exchange_s=kind.times.a2f_s + kind.times.f2a_s,
                overlap=self.stages.efficiency.overlap if layout.num_ubatches > 1 else 0.0,
            )
        return slower * (total + head), kinds, head

    def point(self, layout: Layout, rows: int, limit: str = "rows", derivation: Derivation | None = None) -> GroupPoint:
        """The group at ``rows`` rows per attention rank and ubatch."""
        apply = plainly if derivation is None else derivation.section(f"group {layout.name} at {rows} rows")
        seconds, kinds, head = self.step(layout, rows, apply)
        attention, ffn = self.memory(layout, rows, apply)
        return GroupPoint(
            layout=layout,
            rows=rows,
            step_s=seconds,
            tokens_per_s=apply(
                group_rate,
                num_ranks=layout.num_ranks,
                num_ubatches=layout.num_ubatches,
                rows=rows * self.speculation.tokens(apply) if self.speculation.drafts else rows,
                step_s=seconds,
            ),
            kinds=kinds,
            head_s=head,
            attention_bytes=attention,
            ffn_bytes=ffn,
            limit=limit,
            speculation=self.speculation,
        )

    def best_point(self, layout: Layout, tpot_s: float) -> GroupPoint | None:
        """The group at the largest batch that keeps memory and TPOT; None when one row doesn't."""
        tpot_s *= self.speculation.tokens()  # of a step, which brings so many
        if not self.fits(layout, 1) or self.step(layout, 1)[0] > tpot_s:
            return None
        in_memory = largest(lambda rows: self.fits(layout, rows), MAX_ROWS)
        rows = last_within(lambda count: self.step(layout, count)[0], tpot_s, in_memory)
        limit = "tpot" if rows < in_memory else "memory" if in_memory < MAX_ROWS else "rows"
        return self.point(layout, rows, limit)

    def ubatches_to_hide(self, point: GroupPoint) -> int:
        """Ubatches from which the slowest stage of the main kind of layer would never wait."""
        return min_ubatches(point.main.times)


def last_within(seconds: Callable[[int], float], target_s: float, limit: int) -> int:
    """Largest count in 1..limit whose time, which grows with the count, is within the target; 1 is known to be.

    Times are nearly linear: interpolation finds the place in a few evaluations, halving bounds them.
    """
    low, high = 1, limit
    high_s = seconds(high)
    if high_s <= target_s or high <= low:
        return high
    low_s = seconds(low)
    halve = False
    while high - low > 1:
        share = 0.5 if halve or high_s <= low_s else (target_s - low_s) / (high_s - low_s)
        middle = min(max(low + int((high - low) * share), low + 1), high - 1)
        middle_s = seconds(middle)
        before = high - low
        if middle_s <= target_s:
            low, low_s = middle, middle_s
        else:
            high, high_s = middle, middle_s
        halve = high - low > before // 2
    return low


def largest(holds: Callable[[int], bool], limit: int) -> int:
    """Largest count in 1..limit for which ``holds``, which is true at 1 and once false stays false."""
    low, step = 1, 1
    while low + step <= limit and holds(low + step):
        low, step = low + step, step * 2
    high = min(limit, low + step)
    if high > low and holds(high):
        return high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low
