"""What one token costs a model: bytes of KV and state, operations by part, at a context (pure arithmetic).

"Decoded" counts one row at the end of a context; "prefilled" counts one row of a prompt, averaged over its positions. Must not
know: hardware or prices.
"""

from __future__ import annotations

from dataclasses import dataclass

from antiphon.planner.cost.formats import Formats, bytes_per_value
from antiphon.planner.cost.formula import Apply, formula, plainly
from antiphon.planner.cost.shape import FLOPS_PER_WEIGHT, LINEAR_PASSES, Layer, LinearAttention, ModelShape, SoftmaxAttention

INDEX_BYTES = 1.0  # an indexer's keys and scores are 8-bit


@formula("byte/row", cached_values="value/token", bytes_per_value="byte/value", seen="token/row", num_layers="")
def kv_bytes_read(*, cached_values: float, bytes_per_value: float, seen: float, num_layers: float) -> float:
    """KV read to decode one row, over layers of one kind."""
    return num_layers * cached_values * bytes_per_value * seen


@formula("byte/row", state_values="value/row", bytes_per_value="byte/value", num_layers="")
def state_bytes_moved(*, state_values: float, bytes_per_value: float, num_layers: float) -> float:
    """Recurrent state read and written back to decode one row, over layers of one kind."""
    return 2 * num_layers * state_values * bytes_per_value


@formula("flop/row", flops_per_cached="flop/token", seen="token/row", num_layers="")
def softmax_flops(*, flops_per_cached: float, seen: float, num_layers: float) -> float:
    """Scores and weighted sum of one row, over layers of one kind."""
    return num_layers * flops_per_cached * seen


@formula("flop/row", state_values="value/row", passes="", flops_each="flop/value", num_layers="")
def state_flops(*, state_values: float, passes: float, flops_each: float, num_layers: float) -> float:
    """Update and read-out of the recurrent state for one row, over layers of one kind."""
    return num_layers * state_values * passes * flops_each


@formula("flop/row", weights="value", flops_per_weight="flop/value/row")
def weight_flops(*, weights: float, flops_per_weight: float) -> float:
    """A multiply-add with every weight that one row uses."""
    return weights * flops_per_weight


@formula("token/row", prompt="token/row", window="token/row")
def mean_seen(*, prompt: float, window: float) -> float:
    """Positions a prompt's row sees on average: causal, and at most a window."""
    return prompt / 2 if prompt <= window else window - window * window / prompt / 2


@formula("flop/byte", flops="flop/row", bytes_moved="byte/row")
def arithmetic_intensity(*, flops: float, bytes_moved: float) -> float:
    """Attention operations per byte of KV or state."""
    return flops / bytes_moved


@dataclass(frozen=True, slots=True, kw_only=True)
class RowCost:
    """What one row costs, over some layers."""

    kv_bytes: float  # byte/row: KV and state moved
    attention_flops: float  # flop/row: scores, weighted sums, state updates
    linear_flops: float  # flop/row: projections before and after
    router_flops: float  # flop/row: MoE gates
    ffn_flops: float  # flop/row

    @property
    def flops(self) -> float:
        """All of them, LM head aside."""
        return self.attention_flops + self.linear_flops + self.router_flops + self.ffn_flops


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelCost:
    """One model at one context in given formats."""

    model: str
    context: float
    decode: RowCost
    prefill: RowCost  # per row of a prompt as long as the context; its kv_bytes are those written
    head_flops: float  # flop/row: LM head
    arithmetic_intensity: float
    kv_bytes_per_cached_token: float  # stored, per token of context while every layer still grows
    cache_bytes: float  # stored for one request at the context: KV and state


def _cached(attention: SoftmaxAttention, context: float) -> float:
    """Tokens kept."""
    return context if attention.window is None else min(context, attention.window)


def _seen(attention: SoftmaxAttention, context: float) -> float:
    """Tokens attended."""
    cached = _cached(attention, context)
    return cached if attention.chosen is None else min(cached, attention.chosen)


def kv_format(attention: SoftmaxAttention, formats: Formats) -> str:
    """Format of the layer's KV."""
    return formats.kv if attention.window is None else formats.local_kv


def attention_bytes(layer: Layer, formats: Formats, context: float, count: int = 1, apply: Apply = plainly) -> float:
    """KV and state moved per decoded row by ``count`` such layers."""
    attention = layer.attention
    if isinstance(attention, LinearAttention):
        return apply(
            state_bytes_moved,
            state_values=attention.state_values,
            bytes_per_value=bytes_per_value(formats.state),
            num_layers=count,
        )
    size = bytes_per_value(kv_format(attention, formats))
    total = apply(
        kv_bytes_read, cached_values=attention.cached_values, bytes_per_value=size, seen=_seen(attention, context), num_layers=count
    )
    if attention.index_values:
        total += apply(
            kv_bytes_read,
            cached_values=attention.index_values,
            bytes_per_value=INDEX_BYTES,
            seen=_cached(attention, context),
            num_layers=count,
        )
    return total


def attention_flops(layer: Layer, context: float, count: int = 1, apply: Apply = plainly) -> float:
    """Attention operations per decoded row of ``count`` such layers, projections aside."""
    attention = layer.attention
    if isinstance(attention, LinearAttention):
        return _state_flops(attention, count, apply)
    flops = apply(softmax_flops, flops_per_cached=attention.decode_flops, seen=_seen(attention, context), num_layers=count)
    return flops + _index_flops(attention, _cached(attention, context), count, apply)


def _index_flops(attention: SoftmaxAttention, cached: float, count: int, apply: Apply) -> float:
    if not attention.index_flops:
        return 0.0
    return apply(softmax_flops, flops_per_cached=attention.index_flops, seen=cached, num_layers=count)


def core_flops(layer: Layer, context: float) -> float:
    """Attention operations per decoded row as kernels do them, projections aside."""
    attention = layer.attention
    if isinstance(attention, LinearAttention):
        return _state_flops(attention, 1, plainly)
    return attention.core_flops * _seen(attention, context) + attention.index_flops * _cached(attention, context)


def _state_flops(attention: LinearAttention, count: int, apply: Apply) -> float:
    return apply(
        state_flops,
        state_values=attention.state_values,
        passes=LINEAR_PASSES,
        flops_each=FLOPS_PER_WEIGHT,
        num_layers=count,
    )


def cached_bytes(layer: Layer, formats: Formats, context: float) -> float:
    """Memory that one request's KV or state takes in such a layer."""
    attention = layer.attention
    if isinstance(attention, LinearAttention):
        return attention.state_values * bytes_per_value(formats.state)
    per_token = attention.cached_values * bytes_per_value(kv_format(attention, formats)) + attention.index_values * INDEX_BYTES
    return per_token * _cached(attention, context)


def cache_bytes(shape: ModelShape, formats: Formats, context: float, tensor: int = 1) -> float:
    """Memory that one request's KV and state take at a context, on each of ``tensor`` cards that share its heads."""
    return sum(count * cached_bytes(layer, formats, context) / layer.kv_parts(tensor) for layer, count in shape.kinds)


def _weight_flops(shape: ModelShape, apply: Apply) -> tuple[float, float, float]:
    linear = apply(weight_flops, weights=shape.attention_weights, flops_per_weight=FLOPS_PER_WEIGHT)
    router = apply(weight_flops, weights=shape.router_weights, flops_per_weight=FLOPS_PER_WEIGHT)
    activated = sum(count * layer.ffn.activated_weights for layer, count in shape.kinds)
    return linear, router, apply(weight_flops, weights=activated, flops_per_weight=FLOPS_PER_WEIGHT)


def decode_cost(shape: ModelShape, formats: Formats, context: float, apply: Apply = plainly) -> RowCost:
    """What one decoded row costs at a context."""
    linear, router, ffn = _weight_flops(shape, apply)
    return RowCost(
        kv_bytes=sum(attention_bytes(layer, formats, context, count, apply) for layer, count in shape.kinds),
        attention_flops=sum(attention_flops(layer, context, count, apply) for layer, count in shape.kinds),
        linear_flops=linear,
        router_flops=router,
        ffn_flops=ffn,
    )


def prefill_cost(shape: ModelShape, formats: Formats, prompt: float, apply: Apply = plainly) -> RowCost:
    """What one row of a prompt costs on average; ``kv_bytes`` are the KV and state that it leaves behind."""
    linear, router, ffn = _weight_flops(shape, apply)
    flops = 0.0
    for layer, count in shape.kinds:
        attention = layer.attention
        if isinstance(attention, LinearAttention):
            flops += _state_flops(attention, count, apply)
            continue
        flops += _index_flops(attention, apply(mean_seen, prompt=prompt, window=_cached(attention, prompt)), count, apply)
        window = _seen(attention, prompt)
        flops += apply(
            softmax_flops,
            flops_per_cached=attention.prefill_flops,
            seen=apply(mean_seen, prompt=prompt, window=window),
            num_layers=count,
        )
    return RowCost(
        kv_bytes=cache_bytes(shape, formats, prompt) / prompt,
        attention_flops=flops,
        linear_flops=linear,
        router_flops=router,
        ffn_flops=ffn,
    )


def model_cost(shape: ModelShape, formats: Formats, context: float, apply: Apply = plainly) -> ModelCost:
    """Everything that one model costs at one context."""
    decode = decode_cost(shape, formats, context, apply)
    return ModelCost(
        model=shape.name,
        context=context,
        decode=decode,
        prefill=prefill_cost(shape, formats, context),
        head_flops=apply(weight_flops, weights=shape.head_weights, flops_per_weight=FLOPS_PER_WEIGHT),
        arithmetic_intensity=apply(arithmetic_intensity, flops=decode.attention_flops, bytes_moved=decode.kv_bytes),
        kv_bytes_per_cached_token=sum(
            count * cached_bytes(layer, formats, 1.0)
            for layer, count in shape.kinds
            if isinstance(layer.attention, SoftmaxAttention)
        ),
        cache_bytes=cache_bytes(shape, formats, context),
    )
