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


def sizes_in(directory: Path) -> WeightSizes:
    """What is known of the checkpoint in ``directory``."""
    total = ffn = 0
    for name, size in _tensors(directory):
        total += size
        if _FFN.search(name) and not _ROUTER.search(name):
            ffn += size
    config = _config(directory)
    return WeightSizes(total_bytes=total or None, ffn_bytes=ffn or None, kv_bytes_per_token=_kv_bytes_per_token(config))


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


def _kv_bytes_per_token(config: Mapping[str, Any]) -> int | None:
    """Keys and values of all layers; None for models whose layers do not all keep both."""
    if "kv_lora_rank" in config or "layer_types" in config:
        return None
    try:
        heads = int(config["num_attention_heads"])
        kv_heads = int(config.get("num_key_value_heads") or heads)
        head_dim = int(config.get("head_dim") or config["hidden_size"] // heads)
        dtype = str(config.get("torch_dtype") or config.get("dtype") or "bfloat16")
        return 2 * int(config["num_hidden_layers"]) * kv_heads * head_dim * _DTYPE_BYTES[dtype]
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        return None
