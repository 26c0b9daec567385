"""What a checkpoint directory's bytes are for, read from its config and the headers of its safetensors files (control speed).

Only headers are read. A checkpoint of another form gives figures that are not known. Must not know: who asks.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from antiphon_operator.planning.memory import WeightSizes

_FFN = re.compile(r"\.(mlp|feed_forward|ffn|block_sparse_moe|experts|shared_expert)\.")
_ROUTER = re.compile(r"\.(gate|router)\.(weight|bias)\Z")  # picks experts on the attention side
_MAX_HEADER_BYTES = 100 << 20  # the format's own limit
_DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
_STATE_BYTES = 4  # of a value of a recurrent state
_KNOWN_LAYERS = {"full_attention", "sliding_attention", "linear_attention", "conv"}


def sizes_in(directory: Path) -> WeightSizes:
    """What is known of the checkpoint in ``directory``."""
    total = ffn = 0
    for name, size in _tensors(directory):
        total += size
        if _FFN.search(name) and not _ROUTER.search(name):
            ffn += size
    per_token, state = _cache_bytes(_config(directory))
    return WeightSizes(total_bytes=total or None, ffn_bytes=ffn or None, kv_bytes_per_token=per_token, state_bytes=state)


def _tensors(directory: Path) -> Iterator[tuple[str, int]]:
    for path in sorted(directory.rglob("*.safetensors")):
        try:
            with path.open("rb") as file:
                (length,) = struct.unpack("<Q", file.read(8))
                header = json.loads(file.read(min(length, _MAX_HEADER_BYTES)))
            for name, tensor in header.items():
                if name != "__metadata__":
                    begin, end = tensor["data_offsets"]
                    yield str(name), int(end) - int(begin)
        except (OSError, struct.error, ValueError, KeyError, TypeError, AttributeError):
            continue  # not of this form; loading it will say what is wrong


def _config(directory: Path) -> Mapping[str, Any]:
    try:
        value = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _cache_bytes(config: Mapping[str, Any]) -> tuple[int | None, int | None]:
    """Bytes that all layers keep of a token, and of a sequence where layers have a state; None = not known, or none.

    Fields: https://huggingface.co/docs/transformers, Qwen3-Next, Kimi Linear and LFM2 for states.
    """
    text = config.get("text_config")
    if isinstance(text, Mapping):
        config = {"dtype": config.get("dtype"), **text}
    try:
        itemsize = _DTYPE_BYTES[str(config.get("torch_dtype") or config.get("dtype") or "bfloat16")]
        num_layers = int(config["num_hidden_layers"])
        with_state, values, tail = _states(config, num_layers)
        per_token = (num_layers - with_state) * _layer_token_values(config) * itemsize
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        return None, None
    return per_token, with_state * (values * _STATE_BYTES + tail * itemsize) or None


def _layer_token_values(config: Mapping[str, Any]) -> int:
    """Values that one layer keeps of a token: keys and values of its heads, or a latent and the rotated part of the key."""
    if config.get("kv_lora_rank") is not None:
        return int(config["kv_lora_rank"]) + int(config["qk_rope_head_dim"])
    heads = int(config["num_attention_heads"])
    head_dim = int(config.get("head_dim") or int(config["hidden_size"]) // heads)
    return 2 * int(config.get("num_key_value_heads") or config.get("num_attention_groups") or heads) * head_dim


def _states(config: Mapping[str, Any], num_layers: int) -> tuple[int, int, int]:
    """Layers that have a state, and of each the values kept in fp32 and those, a convolution's last inputs, kept as computed."""
    kinds = list(config.get("layer_types") or ())
    if set(kinds) - _KNOWN_LAYERS or "attn_type_list" in config:
        raise ValueError("layers of a kind that is not known")
    section = config.get("linear_attn_config")
    if isinstance(section, Mapping):  # Kimi Linear
        heads, dim = int(section["num_heads"]), int(section["head_dim"])
        return len(section["kda_layers"]), heads * dim * dim, (int(section["short_conv_kernel_size"]) - 1) * 3 * heads * dim
    if config.get("linear_num_value_heads"):  # Qwen3-Next, Qwen3.5
        keys, key_dim = int(config["linear_num_key_heads"]), int(config["linear_key_head_dim"])
        values, value_dim = int(config["linear_num_value_heads"]), int(config["linear_value_head_dim"])
        every = int(config.get("full_attention_interval") or 4)
        num = kinds.count("linear_attention") if kinds else num_layers - num_layers // every
        taps = int(config["linear_conv_kernel_dim"])
        return num, values * key_dim * value_dim, (taps - 1) * (2 * keys * key_dim + values * value_dim)
    if "conv" in kinds:  # LFM2
        return kinds.count("conv"), 0, (int(config.get("conv_L_cache") or 3) - 1) * int(config["hidden_size"])
    if "linear_attention" in kinds:
        raise ValueError("a state of a size that is not known")
    return 0, 0, 0
