"""Reads a checkpoint's ``config.json`` into a ``ModelShape`` (control speed).

Families differ in what they call things more than in what they do, so this reads by field, not by ``model_type``. Must not
know: files, number formats, or hardware.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from antiphon.core.errors import InvalidInput, UnsupportedModel
from antiphon.planner.cost.shape import FFN, Attention, Layer, LinearAttention, ModelShape, SoftmaxAttention

# The names that families give to one dimension, in order of precedence.
NUM_EXPERTS = ("n_routed_experts", "num_experts", "num_local_experts", "moe_num_experts")
EXPERTS_PER_ROW = ("num_experts_per_tok", "moe_top_k", "moe_k", "moe_topk", "num_experts_per_token")
NUM_KV_HEADS = ("num_key_value_heads", "num_attention_groups", "num_attention_heads")
MAX_DIMENSION = 1_000_000_000
MAX_LAYERS = 100_000
NOT_MODELLED = ("ssm_cfg", "mamba_d_state", "altup_num_inputs")


def shape_of(config: Mapping[str, Any], name: str) -> ModelShape:
    """The shape of the (text) decoder that ``config`` describes.

    Raises:
        InvalidInput: a field that is needed is missing or is no positive integer; ``field`` names it.
        UnsupportedModel: the model has a kind of layer whose cost is not modelled.
    """
    fields = _Fields(_decoder_part(config))
    for field in NOT_MODELLED:
        if fields.raw.get(field) is not None:
            raise UnsupportedModel(f"{name}: {field} describes layers whose cost is not modelled", field)
    if fields.raw.get("index_topk") is not None and fields.optional("kv_lora_rank") is None:
        raise UnsupportedModel(
            f"{name}: index_topk without a latent cache describes layers whose cost is not modelled", "index_topk"
        )
    num_layers = fields.integer("num_hidden_layers", least=1)
    fields.integer("hidden_size", least=1)
    attention_at, is_mixture = _attention(fields, name), _mixture_layers(fields, num_layers)
    mixture = _mixture(fields) if any(is_mixture) else None
    dense = None if all(is_mixture) else _dense(fields)
    layers = []
    for index in range(num_layers):
        ffn = mixture if is_mixture[index] else dense
        assert ffn is not None
        layers.append(Layer(attention=attention_at(index), ffn=ffn))
    return ModelShape(
        name=name,
        hidden_size=fields.integer("hidden_size"),
        vocab_size=fields.integer("vocab_size"),
        tied_embeddings=bool(fields.raw.get("tie_word_embeddings", False)),
        layers=tuple(layers),
    )


def _decoder_part(config: Mapping[str, Any]) -> Mapping[str, Any]:
    for key in ("text_config", "llm_config", "language_config"):
        part = config.get(key)
        if isinstance(part, Mapping):
            return {"tie_word_embeddings": config.get("tie_word_embeddings", False), **part}
    return config


class _Fields:
    def __init__(self, raw: Mapping[str, Any]) -> None:
        self.raw = raw

    def integer(self, *names: str, default: int | None = None, least: int = 0) -> int:
        for name in names:
            value = self.raw.get(name)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= MAX_DIMENSION:
                raise InvalidInput(f"{name}: {str(value)[:64]!r} is not a count from {least} to {MAX_DIMENSION}", name)
            if name == "num_hidden_layers" and value > MAX_LAYERS:
                raise InvalidInput(f"{name}: {value} layers are more than {MAX_LAYERS}", name)
            return value
        if default is None:
            raise InvalidInput(f"config has no {' or '.join(names)}", names[0])
        return default

    def listed(self, name: str, length: int | None = None) -> tuple[Any, ...]:
        """The list of that name, of ``length`` items where one is needed for each layer."""
        value = self.raw.get(name)
        if not isinstance(value, list | tuple):
            raise InvalidInput(f"{name}: {str(value)[:64]!r} is not a list", name)
        if length is not None and len(value) < length:
            raise InvalidInput(f"{name}: has {len(value)} items for {length} layers", name)
        return tuple(value)

    def optional(self, *names: str) -> int | None:
        value = self.integer(*names, default=0)
        return value if value else None


def _attention(fields: _Fields, name: str) -> Callable[[int], Attention]:
    hidden, num_heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    if fields.optional("kv_lora_rank") is not None:
        latent = SoftmaxAttention.latent(
            hidden=hidden,
            num_heads=num_heads,
            q_rank=fields.optional("q_lora_rank"),
            kv_rank=fields.integer("kv_lora_rank"),
            nope_dim=fields.integer("qk_nope_head_dim"),
            rope_dim=fields.integer("qk_rope_head_dim"),
            value_dim=fields.integer("v_head_dim"),
        )
        if fields.optional("index_topk") is not None:
            latent = latent.indexed(
                hidden=hidden,
                q_rank=fields.integer("q_lora_rank", least=1),
                num_heads=fields.integer("index_n_heads", least=1),
                head_dim=fields.integer("index_head_dim", least=1),
                chosen=fields.integer("index_topk"),
            )
        delta = _delta(fields)
        if delta is None:
            return lambda _index: latent
        sees, linear = _layer_windows(fields, name), delta
        return lambda index: linear if sees(index) == "linear" else latent
    if num_heads == 0:
        raise InvalidInput("num_attention_heads: must not be 0", "num_attention_heads")
    num_kv_heads = fields.integer(*NUM_KV_HEADS, least=1)
    head_dim = fields.integer("head_dim", default=max(1, hidden // num_heads), least=1)
    if fields.optional("share_q_dim") is not None:
        factorised = SoftmaxAttention.factorised(
            hidden=hidden,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            q_rank=fields.integer("share_q_dim"),
        )
        return lambda _index: factorised

    sliding_heads, is_gated = _sliding_heads(fields, num_heads), bool(fields.raw.get("use_head_wise_attn_gate"))

    def grouped(window: int | None) -> SoftmaxAttention:
        heads = num_heads if window is None else sliding_heads
        made = SoftmaxAttention.grouped(
            hidden=hidden,
            num_heads=heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            window=window,
            has_output_gate=delta is not None,
        )
        return replace(made, projection_weights=made.projection_weights + hidden * heads) if is_gated else made

    delta = _delta(fields)
    linear = LinearAttention.gated(hidden=hidden, num_heads=num_heads, head_dim=head_dim) if delta is None else delta
    windows = _layer_windows(fields, name)
    return lambda index: linear if windows(index) == "linear" else grouped(_as_window(windows(index)))


def _sliding_heads(fields: _Fields, num_heads: int) -> int:
    """Heads of layers behind a window: Step-3.5 and 3.7 have more of them there."""
    other = fields.raw.get("attention_other_setting")
    if isinstance(other, Mapping):
        return _Fields(other).integer("num_attention_heads", default=num_heads, least=1)
    return fields.integer("num_sliding_attention_heads", default=num_heads, least=1)


def _delta(fields: _Fields) -> LinearAttention | None:
    """The gated delta rule's layers, in Qwen's fields or Kimi's; None where there are none. Their convolutions are of 4 taps."""
    section = fields.raw.get("linear_attn_config")
    if isinstance(section, Mapping):  # Kimi Delta Attention: a decay per channel, low-rank decay and output gate
        own = _Fields(section)
        return LinearAttention.delta(
            hidden=fields.integer("hidden_size"),
            num_key_heads=own.integer("num_heads", least=1),
            num_heads=own.integer("num_heads", least=1),
            key_dim=own.integer("head_dim", least=1),
            value_dim=own.integer("head_dim", least=1),
            num_taps=own.integer("short_conv_kernel_size", default=4, least=1),
            low_rank=own.integer("head_dim", least=1),
        )
    if fields.optional("linear_num_value_heads") is None:
        return None
    return LinearAttention.delta(
        hidden=fields.integer("hidden_size"),
        num_key_heads=fields.integer("linear_num_key_heads", least=1),
        num_heads=fields.integer("linear_num_value_heads", least=1),
        key_dim=fields.integer("linear_key_head_dim", least=1),
        value_dim=fields.integer("linear_value_head_dim", least=1),
        num_taps=fields.integer("linear_conv_kernel_dim", default=4, least=1),
    )


def _as_window(window: int | str | None) -> int | None:
    return window if isinstance(window, int) else None


def _layer_windows(fields: _Fields, name: str) -> Callable[[int], int | str | None]:
    """What each layer sees: None = all, a number of tokens, or "linear"."""
    raw, num_layers = fields.raw, fields.integer("num_hidden_layers")
    sliding, chunk = fields.optional("sliding_window"), fields.optional("attention_chunk_size")
    if raw.get("attn_type_list") is not None:  # 0 = linear, 1 = softmax over everything
        kinds = fields.listed("attn_type_list", num_layers)
        return lambda index: None if kinds[index] == 1 else "linear"
    if raw.get("layer_types") is not None:
        meaning: dict[str, int | str | None] = {
            "full_attention": None,
            "sliding_attention": sliding,
            "chunked_attention": chunk,
            "linear_attention": "linear",
        }
        types = fields.listed("layer_types", num_layers)
        for kind in types:
            if not isinstance(kind, str) or kind not in meaning:
                raise UnsupportedModel(f"{name}: the cost of {str(kind)[:64]!r} layers is not modelled", "layer_types")
        return lambda index: meaning[types[index]]
    section = raw.get("linear_attn_config")
    if isinstance(section, Mapping):  # which counts layers from one
        linear = set(_Fields(section).listed("kda_layers"))
        return lambda index: "linear" if index + 1 in linear else None
    if raw.get("linear_num_value_heads") is not None:
        every = fields.integer("full_attention_interval", default=4, least=1)
        return lambda index: None if (index + 1) % every == 0 else "linear"
    if chunk is not None:  # layers without rotary positions see the whole context
        no_rope = fields.listed("no_rope_layers", num_layers) if raw.get("no_rope_layers") else None
        interval = fields.integer("no_rope_layer_interval", default=4, least=1)
        if no_rope is not None:
            return lambda index: None if not no_rope[index] else chunk
        return lambda index: None if (index + 1) % interval == 0 else chunk
    if sliding is not None and raw.get("use_sliding_window", True):
        first = fields.integer("max_window_layers", default=0) if "use_sliding_window" in raw else 0
        return lambda index: sliding if index >= first else None
    return lambda _index: None


def _mixture_layers(fields: _Fields, num_layers: int) -> list[bool]:
    raw = fields.raw
    if fields.integer(*NUM_EXPERTS, default=0) <= 1:
        return [False] * num_layers
    listed = raw.get("moe_layers_enum") or raw.get("moe_layers")
    if listed is not None:
        name = "moe_layers_enum" if raw.get("moe_layers_enum") else "moe_layers"
        items = listed.split(",") if isinstance(listed, str) else fields.listed(name)
        try:
            indices = {int(item) for item in items}
        except (TypeError, ValueError, OverflowError):
            raise InvalidInput(f"{name}: {str(listed)[:64]!r} is no list of layers", name) from None
        return [index in indices for index in range(num_layers)]
    if raw.get("mlp_layer_types") is not None:
        return [kind == "sparse" for kind in fields.listed("mlp_layer_types", num_layers)[:num_layers]]
    first = fields.integer("first_k_dense_replace", "moe_layer_start_index", default=0)
    last = fields.integer("moe_layer_end_index", default=num_layers - 1)
    every = fields.integer("interleave_moe_layer_step", "decoder_sparse_step", "moe_layer_freq", "moe_layer_interval", default=1)
    dense = fields.listed("mlp_only_layers") if raw.get("mlp_only_layers") else ()
    return [
        first <= index <= last and index not in dense and (every <= 1 or (index + 1) % every == 0) for index in range(num_layers)
    ]


def _mixture(fields: _Fields) -> FFN:
    hidden = fields.integer("hidden_size")
    intermediate = fields.integer("moe_intermediate_size", "intermediate_size")
    shared = fields.integer("shared_expert_intermediate_size", "share_expert_dim", "shared_intermediate_size", default=0)
    if not shared:
        shared = intermediate * fields.integer("n_shared_experts", "moe_num_shared_experts", "num_shared_experts", default=0)
    if fields.optional("intermediate_size_mlp") is not None:  # one shared expert of an expert's size beside the routed ones
        shared = intermediate
    num, per_row = fields.integer(*NUM_EXPERTS), fields.integer(*EXPERTS_PER_ROW, least=1)
    if per_row > num:
        raise InvalidInput(f"{EXPERTS_PER_ROW[0]}: {per_row} experts a token are more than the {num} there are", EXPERTS_PER_ROW[0])
    return FFN.experts(
        hidden=hidden,
        intermediate=intermediate,
        num=num,
        per_row=per_row,
        shared_intermediate=shared,
    )


def _dense(fields: _Fields) -> FFN:
    gated = fields.raw.get("hidden_act", "silu") in ("silu", "swish", "gelu_pytorch_tanh", "swiglu", "gelu_tanh")
    return FFN.dense(
        fields.integer("hidden_size"),
        fields.integer("intermediate_size_mlp", "intermediate_size"),
        num_matrices=3 if gated else 2,
    )
