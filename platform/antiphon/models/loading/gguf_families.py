"""What GGUF calls things and what Hugging Face calls them, family by family: config and tensor names (control speed).

Must not know: files to write, tokenizers, or torch.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal

import numpy as np

from antiphon.core.errors import CheckpointInvalid, UnsupportedModel
from antiphon.models.loading.gguf_file import GgufFile

_TOP: Final[Mapping[str, str]] = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER: Final[Mapping[str, str]] = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_HEAD_NORMS: Final[Mapping[str, str]] = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_GEMMA3_LAYER: Final[Mapping[str, str]] = {
    **_LAYER,
    **_HEAD_NORMS,
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_ROPE_FACTORS: Final = "rope_freqs.weight"
_NAME: Final = re.compile(r"(?:blk\.(\d+)\.)?([a-z_]+)\.(weight|bias)")

# Llama 3.1 and later stretch low frequencies; GGUF stores the resulting factors, Hugging Face what they came from.
_LLAMA3_ROPE: Final[Mapping[str, float]] = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One architecture in both vocabularies."""

    architecture: str  # GGUF's general.architecture
    model_type: str
    causal_lm: str  # the class transformers names in config.json
    layer_names: Mapping[str, str]
    rope_rows: Literal["halves", "interleaved"] = "halves"  # how GGUF orders the rows of q and k within a head
    biases: Literal["none", "qkv", "optional"] = "none"
    norm_shift: float = 0.0  # GGUF's norm weights are this much larger than Hugging Face's
    extra_config: Mapping[str, Any] = field(default_factory=dict)


_QWEN_WINDOW: Final[Mapping[str, Any]] = {"use_sliding_window": False, "sliding_window": None}

FAMILIES: Final[Mapping[str, Family]] = {
    family.architecture: family
    for family in (
        Family(
            architecture="llama",
            model_type="llama",
            causal_lm="LlamaForCausalLM",
            layer_names=_LAYER,
            rope_rows="interleaved",
            biases="optional",
        ),
        Family(
            architecture="qwen2",
            model_type="qwen2",
            causal_lm="Qwen2ForCausalLM",
            layer_names=_LAYER,
            biases="qkv",
            extra_config=_QWEN_WINDOW,
        ),
        Family(
            architecture="qwen3",
            model_type="qwen3",
            causal_lm="Qwen3ForCausalLM",
            layer_names={**_LAYER, **_HEAD_NORMS},
            extra_config={**_QWEN_WINDOW, "attention_bias": False},
        ),
        Family(
            architecture="gemma3",
            model_type="gemma3_text",
            causal_lm="Gemma3ForCausalLM",
            layer_names=_GEMMA3_LAYER,
            norm_shift=1.0,
            extra_config={
                "attention_bias": False,
                "attn_logit_softcapping": None,
                "final_logit_softcapping": None,
                "hidden_activation": "gelu_pytorch_tanh",
                "use_bidirectional_attention": False,
            },
        ),
    )
}


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedTensor:
    """One tensor to write: its name there and here, its shape, how many rotary heads to reorder (0: none), what to add to it."""

    name: str
    source: str
    shape: tuple[int, ...]
    num_reordered_heads: int = 0
    shift: float = 0.0


def family_of(gguf: GgufFile) -> Family:
    """The family of a file.

    Raises:
        UnsupportedModel: its architecture is not one of FAMILIES.
    """
    architecture = gguf.text("general.architecture")
    if architecture not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        raise UnsupportedModel(f"{gguf.path}: architecture {architecture!r} can't be converted (only {known})")
    return FAMILIES[architecture]


def hf_config(gguf: GgufFile, family: Family, dtype: str) -> dict[str, Any]:
    """config.json as transformers writes it for the family.

    Raises:
        UnsupportedModel: a field says the model computes something the family's config can't express.
        CheckpointInvalid: a field is missing or contradicts a tensor.
    """
    a = family.architecture
    num_heads = gguf.integer(f"{a}.attention.head_count")
    hidden_size = gguf.integer(f"{a}.embedding_length")
    for key, value in (("attention.head_count", num_heads), ("embedding_length", hidden_size)):
        if value < 1:
            raise CheckpointInvalid(f"{gguf.path}: field '{a}.{key}' is {value}")
    if gguf.integer(f"{a}.block_count") > len(gguf.tensor_names):
        raise CheckpointInvalid(f"{gguf.path}: field '{a}.block_count' is above the number of tensors")
    head_dim = gguf.integer(f"{a}.attention.key_length", hidden_size // num_heads)
    _refuse_unsupported(gguf, a, head_dim)
    embedding = gguf.shape("token_embd.weight")
    if len(embedding) != 2:
        raise CheckpointInvalid(f"{gguf.path}: token_embd.weight has shape {list(embedding)}, not two dimensions")
    vocab_size, embedding_width = embedding
    if embedding_width != hidden_size:
        raise CheckpointInvalid(
            f"{gguf.path}: field '{a}.embedding_length' is {hidden_size}, but token_embd.weight is {embedding_width} wide"
        )
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": gguf.number(f"{a}.rope.freq_base", 10000.0)}
    config: dict[str, Any] = {
        "architectures": [family.causal_lm],
        "model_type": family.model_type,
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "intermediate_size": gguf.integer(f"{a}.feed_forward_length"),
        "num_hidden_layers": gguf.integer(f"{a}.block_count"),
        "num_attention_heads": num_heads,
        "num_key_value_heads": gguf.integer(f"{a}.attention.head_count_kv", num_heads),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": gguf.integer(f"{a}.context_length"),
        "rms_norm_eps": gguf.number(f"{a}.attention.layer_norm_rms_epsilon"),
        "rope_theta": rope["rope_theta"],
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "use_cache": True,
        "tie_word_embeddings": "output.weight" not in gguf.tensor_names,
        "bos_token_id": gguf.optional_integer("tokenizer.ggml.bos_token_id"),
        "eos_token_id": gguf.optional_integer("tokenizer.ggml.eos_token_id"),
        "pad_token_id": gguf.optional_integer("tokenizer.ggml.padding_token_id"),
        "torch_dtype": dtype,
        **family.extra_config,
    }
    if _ROPE_FACTORS in gguf.tensor_names:
        rope |= _llama3_rope(gguf, rope["rope_theta"], head_dim)
        config["rope_scaling"] = {key: value for key, value in rope.items() if key != "rope_theta"}
    config["rope_parameters"] = rope
    if family.architecture == "gemma3":
        del config["hidden_act"]  # it has a field of its own
        config |= _gemma3(gguf, rope)
    if family.biases == "optional":
        config["attention_bias"] = _all_or_none(gguf, ("attn_q", "attn_k", "attn_v", "attn_output"))
        config["mlp_bias"] = _all_or_none(gguf, ("ffn_gate", "ffn_up", "ffn_down"))
    return config


def plan_tensors(gguf: GgufFile, family: Family, config: Mapping[str, Any]) -> list[PlannedTensor]:
    """Every tensor to write, in the file's order of layers.

    Raises:
        UnsupportedModel: the file holds a tensor the family has no name for.
        CheckpointInvalid: one of the family's tensors is missing.
    """
    num_layers: int = config["num_hidden_layers"]
    expected = {"token_embd.weight", "output_norm.weight"} | {
        f"blk.{layer}.{name}.{kind}" for layer in range(num_layers) for name, kind in _layer_tensors(family, config)
    }
    missing = sorted(expected - gguf.tensor_names)
    if missing:
        raise CheckpointInvalid(f"{gguf.path}: has no tensor {missing[0]!r} ({len(missing)} missing in all)")
    unknown = sorted(gguf.tensor_names - expected - {"output.weight", _ROPE_FACTORS})
    if unknown:
        raise UnsupportedModel(
            f"{gguf.path}: tensor {unknown[0]!r} is not part of a {family.model_type} model of {num_layers} layers"
        )
    planned = [_planned(gguf, family, config, name) for name in gguf.tensor_names if name != _ROPE_FACTORS]
    return sorted(planned, key=_place)


def _place(tensor: PlannedTensor) -> tuple[int, str]:
    layer = re.match(r"model\.layers\.(\d+)\.", tensor.name)
    return (int(layer[1]) if layer else -1, tensor.name)


def _planned(gguf: GgufFile, family: Family, config: Mapping[str, Any], source: str) -> PlannedTensor:
    match = _NAME.fullmatch(source)
    assert match is not None, "names were checked against the family's"
    layer, stem, kind = match.groups()
    name = _TOP[stem] if layer is None else f"model.layers.{layer}.{family.layer_names[stem]}"
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    return PlannedTensor(
        name=f"{name}.{kind}",
        source=source,
        shape=gguf.shape(source),
        num_reordered_heads=heads.get(stem, 0) if family.rope_rows == "interleaved" else 0,
        shift=-family.norm_shift if family.norm_shift and stem.endswith("_norm") else 0.0,
    )


def _layer_tensors(family: Family, config: Mapping[str, Any]) -> list[tuple[str, str]]:
    tensors = [(name, "weight") for name in family.layer_names]
    if family.biases == "qkv":
        tensors += [(name, "bias") for name in ("attn_q", "attn_k", "attn_v")]
    if config.get("attention_bias"):
        tensors += [(name, "bias") for name in ("attn_q", "attn_k", "attn_v", "attn_output")]
    if config.get("mlp_bias"):
        tensors += [(name, "bias") for name in ("ffn_gate", "ffn_up", "ffn_down")]
    return tensors


def _all_or_none(gguf: GgufFile, names: tuple[str, ...]) -> bool:
    present = [f"blk.0.{name}.bias" in gguf.tensor_names for name in names]
    if any(present) != all(present):
        raise UnsupportedModel(f"{gguf.path}: only some of {', '.join(names)} have a bias, which llama's config can't say")
    return all(present)


def _refuse_unsupported(gguf: GgufFile, a: str, head_dim: int) -> None:
    num_experts = gguf.integer(f"{a}.expert_count", 0)
    if num_experts > 0:
        raise UnsupportedModel(f"{gguf.path}: field '{a}.expert_count' is {num_experts}; only dense models are converted")
    scaling = gguf.text(f"{a}.rope.scaling.type", "none")
    if scaling != "none":
        raise UnsupportedModel(f"{gguf.path}: field '{a}.rope.scaling.type' is {scaling!r}, which is not supported")
    for key in ("rope.dimension_count", "attention.value_length"):
        size = gguf.integer(f"{a}.{key}", head_dim)
        if size != head_dim:
            raise UnsupportedModel(f"{gguf.path}: field '{a}.{key}' is {size}, but heads have {head_dim} dimensions")


# Gemma 3's GGUF files leave out what is the same in all sizes (arXiv 2503.19786 §2): five sliding layers to one full layer, and
# the rotary base of sliding layers. They leave out, too, that the 27B (62 layers) scales scores by hidden size per head.
_GEMMA3_PERIOD: Final = 6
_GEMMA3_LOCAL_THETA: Final = 10_000.0
_GEMMA3_27B_LAYERS: Final = 62


def _gemma3(gguf: GgufFile, rope: Mapping[str, Any]) -> dict[str, Any]:
    a = "gemma3"
    num_layers, num_heads = gguf.integer(f"{a}.block_count"), gguf.integer(f"{a}.attention.head_count")
    hidden_size = gguf.integer(f"{a}.embedding_length")
    head_dim = gguf.integer(f"{a}.attention.key_length", hidden_size // num_heads)
    for key in ("attn_logit_softcapping", "final_logit_softcapping"):
        if gguf.has(f"{a}.{key}"):
            raise UnsupportedModel(f"{gguf.path}: field '{a}.{key}' is not part of Gemma 3")
    is_27b = num_layers == _GEMMA3_27B_LAYERS
    kinds = ["full_attention" if (i + 1) % _GEMMA3_PERIOD == 0 else "sliding_attention" for i in range(num_layers)]
    return {
        "query_pre_attn_scalar": hidden_size // num_heads if is_27b else head_dim,
        "sliding_window": gguf.integer(f"{a}.attention.sliding_window"),
        "layer_types": kinds,
        "rope_local_base_freq": _GEMMA3_LOCAL_THETA,
        "rope_parameters": {
            "full_attention": dict(rope),
            "sliding_attention": {"rope_type": "default", "rope_theta": _GEMMA3_LOCAL_THETA},
        },
    }


def _llama3_rope(gguf: GgufFile, theta: float, head_dim: int) -> dict[str, Any]:
    """The parameters whose factors equal the stored ones."""
    stored = gguf.tensor(_ROPE_FACTORS).astype(np.float64)
    factor = float(stored[-1])
    low, high = _LLAMA3_ROPE["low_freq_factor"], _LLAMA3_ROPE["high_freq_factor"]
    wavelength = 2 * math.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    smooth = np.clip((_LLAMA3_ROPE["original_max_position_embeddings"] / wavelength - low) / (high - low), 0, 1)
    computed = 1 / ((1 - smooth) / factor + smooth)
    if stored.shape != computed.shape or not np.allclose(stored, computed, rtol=1e-4):
        raise UnsupportedModel(f"{gguf.path}: tensor {_ROPE_FACTORS!r} holds rotary factors of an unknown kind")
    return {"rope_type": "llama3", "factor": factor, **_LLAMA3_ROPE}
