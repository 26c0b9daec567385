"""How long each half of a layer takes on given cards: a roofline with fixed costs (pure arithmetic).

Attention is data-parallel: every attention card holds all attention weights and the KV of its own rows. The FFN is sharded over
its cards. Must not know: ubatches, schedules or prices.
"""

from __future__ import annotations

from dataclasses import dataclass

from antiphon.planner.cost.formats import Formats, bytes_per_value
from antiphon.planner.cost.formula import Apply, formula, plainly
from antiphon.planner.cost.hardware import Accelerator, Efficiency
from antiphon.planner.cost.model_cost import attention_bytes, attention_flops
from antiphon.planner.cost.shape import FFN, FLOPS_PER_WEIGHT, Layer, ModelShape, SoftmaxAttention
from antiphon.planner.pipeline.barrier import imbalance


@formula("s", rows="row", flops_per_row="flop/row", bytes_per_row="byte/row", flops="flop/s", bandwidth="byte/s")
def core_s(*, rows: float, flops_per_row: float, bytes_per_row: float, flops: float, bandwidth: float) -> float:
    """Scores, weighted sums and state updates: the longer of computing and of reading KV."""
    return max(rows * flops_per_row / flops, rows * bytes_per_row / bandwidth)


@formula("s", rows="row", flops_per_row="flop/row", weight_bytes="byte", flops="flop/s", bandwidth="byte/s")
def weights_s(*, rows: float, flops_per_row: float, weight_bytes: float, flops: float, bandwidth: float) -> float:
    """A product with weights on one card: the longer of computing and of reading the weights once."""
    return max(rows * flops_per_row / flops, weight_bytes / bandwidth)


@formula(
    "s",
    rows="row",
    flops_per_row="flop/row",
    touched_bytes="byte",
    hottest="",
    num_cards="card",
    flops="flop/card/s",
    bandwidth="byte/card/s",
)
def ffn_cards_s(
    *,
    rows: float,
    flops_per_row: float,
    touched_bytes: float,
    hottest: float,
    num_cards: float,
    flops: float,
    bandwidth: float,
) -> float:
    """The FFN on its hottest card: the longer of computing its rows and of reading the weights that they touch."""
    return max(hottest * rows * flops_per_row / (num_cards * flops), touched_bytes / (num_cards * bandwidth))


@formula("value", always="value", num_experts="", expert="value", experts_per_row="", rows="")
def touched_weights(*, always: float, num_experts: float, expert: float, experts_per_row: float, rows: float) -> float:
    """Weights that a batch reads: the shared ones, and each expert that at least one row draws."""
    return always + num_experts * expert * (1 - (1 - experts_per_row / num_experts) ** rows)  # type: ignore[no-any-return]  # a float's power


@formula("s", compute_s="s", overhead_s="s")
def with_overhead_s(*, compute_s: float, overhead_s: float) -> float:
    """A stage with its fixed cost."""
    return compute_s + overhead_s


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptRows:
    """Rows of prompts that run in the same step as decode rows, per attention card."""

    rows: float = 0.0
    prompt: float = 0.0  # length of their prompts, in tokens


NO_PROMPTS = PromptRows()


@dataclass(frozen=True, slots=True, kw_only=True)
class Roofline:
    """Stage times of one model on one kind of card per side."""

    shape: ModelShape
    formats: Formats
    attention: Accelerator
    ffn: Accelerator
    efficiency: Efficiency
    expert_skew: float = 1.0  # lasting load of the hottest FFN card over the mean

    def attention_s(
        self,
        layer: Layer,
        rows: float,
        context: float,
        prompts: PromptRows = NO_PROMPTS,
        apply: Apply = plainly,
    ) -> float:
        """Seconds of the attention half of one layer on one card, for one ubatch of ``rows`` decode rows."""
        flops = self.attention.flops_in(self.formats.compute) * self.efficiency.compute
        bandwidth = self.attention.bandwidth * self.efficiency.memory
        seconds = apply(
            core_s,
            rows=rows,
            flops_per_row=attention_flops(layer, context),
            bytes_per_row=attention_bytes(layer, self.formats, context),
            flops=flops,
            bandwidth=bandwidth,
        )
        if prompts.rows:
            seconds += prompts.rows * self._prompt_flops(layer, prompts.prompt) / flops
        weights = layer.attention.projection_weights + layer.ffn.router_weights
        seconds += apply(
            weights_s,
            rows=rows + prompts.rows,
            flops_per_row=FLOPS_PER_WEIGHT * weights,
            weight_bytes=weights * bytes_per_value(self.formats.weights),
            flops=flops,
            bandwidth=bandwidth,
        )
        return apply(with_overhead_s, compute_s=seconds, overhead_s=self.efficiency.stage_overhead_s)

    def _prompt_flops(self, layer: Layer, prompt: float) -> float:
        attention = layer.attention
        if not isinstance(attention, SoftmaxAttention):
            return attention_flops(layer, prompt)
        window = prompt if attention.window is None else min(prompt, attention.window)
        return attention.prefill_flops * (window - window * window / prompt / 2)

    def ffn_s(self, ffn: FFN, rows: float, num_cards: int, apply: Apply = plainly) -> float:
        """Seconds of the FFN half of one layer on its hottest card, for ``rows`` rows from all attention cards."""
        touched: float = ffn.always_weights
        if ffn.num_experts:
            touched = apply(
                touched_weights,
                always=ffn.always_weights,
                num_experts=ffn.num_experts,
                expert=ffn.expert_weights,
                experts_per_row=ffn.experts_per_row,
                rows=rows,
            )
        seconds = apply(
            ffn_cards_s,
            rows=rows,
            flops_per_row=FLOPS_PER_WEIGHT * ffn.activated_weights,
            touched_bytes=touched * bytes_per_value(self.formats.weights),
            hottest=imbalance(rows=rows, experts_per_row=ffn.experts_per_row, num_cards=num_cards, skew=self.expert_skew),
            num_cards=num_cards,
            flops=self.ffn.flops_in(self.formats.compute) * self.efficiency.compute,
            bandwidth=self.ffn.bandwidth * self.efficiency.memory,
        )
        return apply(with_overhead_s, compute_s=seconds, overhead_s=self.efficiency.stage_overhead_s)

    def head_s(self, rows: float, apply: Apply = plainly) -> float:
        """Seconds of the LM head on one attention card, for all its rows of a step."""
        return apply(
            weights_s,
            rows=rows,
            flops_per_row=FLOPS_PER_WEIGHT * self.shape.head_weights,
            weight_bytes=self.shape.head_weights * bytes_per_value(self.formats.weights),
            flops=self.attention.flops_in(self.formats.compute) * self.efficiency.compute,
            bandwidth=self.attention.bandwidth * self.efficiency.memory,
        )

    def attention_bound(self, layer: Layer, rows: float, context: float) -> str:
        """What an attention stage spends most of its time on."""
        flops = self.attention.flops_in(self.formats.compute) * self.efficiency.compute
        bandwidth = self.attention.bandwidth * self.efficiency.memory
        weights = layer.attention.projection_weights + layer.ffn.router_weights
        parts = {
            "attention compute": rows * attention_flops(layer, context) / flops,
            "KV bandwidth": rows * attention_bytes(layer, self.formats, context) / bandwidth,
            "projection compute": rows * FLOPS_PER_WEIGHT * weights / flops,
            "attention weight reads": weights * bytes_per_value(self.formats.weights) / bandwidth,
        }
        return max(parts, key=parts.__getitem__)

    def ffn_compute_share(self, ffn: FFN, rows: float, num_cards: int) -> float:
        """Time of computing over time of the whole FFN stage: 1 = bound by computing."""
        flops = self.ffn.flops_in(self.formats.compute) * self.efficiency.compute
        ideal = rows * FLOPS_PER_WEIGHT * ffn.activated_weights / (num_cards * flops)
        return ideal / self.ffn_s(ffn, rows, num_cards)
