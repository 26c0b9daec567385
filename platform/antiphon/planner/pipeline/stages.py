"""How long each half of a layer takes on given cards: a roofline with fixed costs (pure arithmetic).

Attention is data-parallel over ranks: every rank holds all attention weights and the KV of its own rows. A rank is a card, or
``tensor`` cards of a node that share its heads (tensor parallelism) and add up their outputs. The FFN is sharded over its cards.
Must not know: ubatches, schedules or prices.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from antiphon.planner.cost.formats import Formats, bytes_per_value
from antiphon.planner.cost.formula import Apply, formula, plainly
from antiphon.planner.cost.hardware import Accelerator, Efficiency
from antiphon.planner.cost.model_cost import attention_bytes, attention_flops, core_flops
from antiphon.planner.cost.shape import FFN, FLOPS_PER_WEIGHT, Layer, ModelShape, SoftmaxAttention
from antiphon.planner.pipeline.barrier import imbalance
from antiphon.planner.pipeline.fabric import sum_over_cards_s


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


@formula("s", compute_s="s", num_kernels="", kernel_s="s")
def with_kernels_s(*, compute_s: float, num_kernels: float, kernel_s: float) -> float:
    """A stage with the fixed cost of its kernels."""
    return compute_s + num_kernels * kernel_s


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

    def _core(self, layer: Layer, context: float, tensor: int) -> tuple[float, float]:
        """Operations and bytes of the attention core per row, on one of ``tensor`` cards.

        Matrix units multiply at least ``mma_rows`` rows: fewer queries that share a KV head cost as many.
        """
        attention = layer.attention
        flops = core_flops(layer, context) / tensor
        if isinstance(attention, SoftmaxAttention):
            queries = attention.num_heads / tensor / max(1.0, attention.num_kv_heads / tensor)
            flops *= math.ceil(queries / self.attention.mma_rows) * self.attention.mma_rows / queries
        return flops, attention_bytes(layer, self.formats, context) / layer.kv_parts(tensor)

    def _core_rates(self) -> tuple[float, float]:
        """Operations and bytes per second of the attention core."""
        card = self.attention
        return card.flops_in(self.formats.attention) * self.efficiency.attention, card.bandwidth * self.efficiency.kv

    def attention_s(
        self,
        layer: Layer,
        rows: float,
        context: float,
        prompts: PromptRows = NO_PROMPTS,
        apply: Apply = plainly,
        tensor: int = 1,
    ) -> float:
        """Seconds of the attention half of one layer on one rank of ``tensor`` cards, for one ubatch of ``rows`` decode rows."""
        core_rate, kv_rate = self._core_rates()
        flops_per_row, bytes_per_row = self._core(layer, context, tensor)
        seconds = apply(
            core_s, rows=rows, flops_per_row=flops_per_row, bytes_per_row=bytes_per_row, flops=core_rate, bandwidth=kv_rate
        )
        if prompts.rows:
            seconds += prompts.rows * self._prompt_flops(layer, prompts.prompt) / (tensor * core_rate)
        weights = (layer.attention.projection_weights + layer.ffn.router_weights) / tensor
        seconds += apply(
            weights_s,
            rows=rows + prompts.rows,
            flops_per_row=FLOPS_PER_WEIGHT * weights,
            weight_bytes=weights * bytes_per_value(self.formats.weights),
            flops=self.attention.flops_in(self.formats.compute) * self.efficiency.compute,
            bandwidth=self.attention.bandwidth * self.efficiency.memory,
        )
        seconds = apply(with_kernels_s, compute_s=seconds, num_kernels=layer.attention_kernels, kernel_s=self.efficiency.kernel_s)
        return seconds + self.all_reduce_s(rows + prompts.rows, tensor, self.attention, apply)

    def all_reduce_s(self, rows: float, num_cards: int, card: Accelerator, apply: Apply = plainly) -> float:
        """Seconds in which cards of a node add up ``rows`` rows that each has a part of; 0 for one card."""
        if num_cards == 1:
            return 0.0
        return apply(
            sum_over_cards_s,
            rows=rows,
            hidden=self.shape.hidden_size,
            bytes_per_value=bytes_per_value(self.formats.f2a),
            num_cards=num_cards,
            bandwidth=card.scale_up_bandwidth * self.efficiency.network,
            latency_s=self.efficiency.link_latency_s,
        )

    def _prompt_flops(self, layer: Layer, prompt: float) -> float:
        attention = layer.attention
        if not isinstance(attention, SoftmaxAttention):
            return attention_flops(layer, prompt)
        window = min(prompt, *(limit for limit in (attention.window, attention.chosen, prompt) if limit is not None))
        return attention.prefill_flops * (window - window * window / prompt / 2) + attention.index_flops * prompt / 2

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
        return apply(with_kernels_s, compute_s=seconds, num_kernels=ffn.kernels, kernel_s=self.efficiency.kernel_s)

    def head_s(self, rows: float, apply: Apply = plainly, tensor: int = 1) -> float:
        """Seconds of the LM head on one rank, for all its rows of a step."""
        weights = self.shape.head_weights / tensor
        return apply(
            weights_s,
            rows=rows,
            flops_per_row=FLOPS_PER_WEIGHT * weights,
            weight_bytes=weights * bytes_per_value(self.formats.weights),
            flops=self.attention.flops_in(self.formats.compute) * self.efficiency.compute,
            bandwidth=self.attention.bandwidth * self.efficiency.memory,
        )

    def attention_parts(self, rows: float, context: float) -> dict[str, float]:
        """Seconds at the peaks of the main kind of layer's attention half, by the share that scales each; kernels by their count.

        Of two sides of a roofline only the one that counts at the present shares is there.
        """
        layer = self.shape.kinds[-1][0]
        core, kv = self._core(layer, context, 1)
        weights = layer.attention.projection_weights + layer.ffn.router_weights
        sides = (
            ("attention", rows * core / self.attention.flops_in(self.formats.attention)),
            ("kv", rows * kv / self.attention.bandwidth),
            ("compute", rows * FLOPS_PER_WEIGHT * weights / self.attention.flops_in(self.formats.compute)),
            ("memory", weights * bytes_per_value(self.formats.weights) / self.attention.bandwidth),
        )
        parts = dict([self._longer(*sides[:2]), self._longer(*sides[2:])])
        return parts | {"kernel_s": float(layer.attention_kernels)}

    def ffn_parts(self, rows: float) -> dict[str, float]:
        """As ``attention_parts`` for the FFN half on one card."""
        ffn = self.shape.kinds[-1][0].ffn
        touched: float = ffn.always_weights
        if ffn.num_experts:
            touched = touched_weights(
                always=ffn.always_weights,
                num_experts=ffn.num_experts,
                expert=ffn.expert_weights,
                experts_per_row=ffn.experts_per_row,
                rows=rows,
            )
        longer = self._longer(
            ("compute", rows * FLOPS_PER_WEIGHT * ffn.activated_weights / self.ffn.flops_in(self.formats.compute)),
            ("memory", touched * bytes_per_value(self.formats.weights) / self.ffn.bandwidth),
        )
        return dict([longer]) | {"kernel_s": float(ffn.kernels)}

    def _longer(self, one: tuple[str, float], other: tuple[str, float]) -> tuple[str, float]:
        """Of two named times at the peak, the one that is longer at the shares reached."""
        return max(one, other, key=lambda side: side[1] / getattr(self.efficiency, side[0]))

    def attention_bound(self, layer: Layer, rows: float, context: float, tensor: int = 1) -> str:
        """What an attention stage spends most of its time on."""
        flops = self.attention.flops_in(self.formats.compute) * self.efficiency.compute
        bandwidth = self.attention.bandwidth * self.efficiency.memory
        core_rate, kv_rate = self._core_rates()
        core, kv = self._core(layer, context, tensor)
        weights = (layer.attention.projection_weights + layer.ffn.router_weights) / tensor
        parts = {
            "attention compute": rows * core / core_rate,
            "KV bandwidth": rows * kv / kv_rate,
            "projection compute": rows * FLOPS_PER_WEIGHT * weights / flops,
            "attention weight reads": weights * bytes_per_value(self.formats.weights) / bandwidth,
            "attention kernel launches": layer.attention_kernels * self.efficiency.kernel_s,
            "adding up over the cards of a rank": self.all_reduce_s(rows, tensor, self.attention),
        }
        return max(parts, key=parts.__getitem__)

    def ffn_compute_share(self, ffn: FFN, rows: float, num_cards: int) -> float:
        """Time of computing over time of the whole FFN stage: 1 = bound by computing."""
        flops = self.ffn.flops_in(self.formats.compute) * self.efficiency.compute
        ideal = rows * FLOPS_PER_WEIGHT * ffn.activated_weights / (num_cards * flops)
        return ideal / self.ffn_s(ffn, rows, num_cards)
