"""The registered ops ``antiphon_cards::*``: their signatures, and who serves them on which device (hot).

A card is served by Triton, which is imported when a card's first tensor arrives; a CPU by the torch reference, or in a process with
``TRITON_INTERPRET=1`` by the same kernels in Triton's interpreter; tensors without memory by their shapes. Registered with
``Library``, whose calls cost a seventh of ``custom_op``'s. Must not know: what the ops compute.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch

from antiphon.models.cards import reference

_KERNELS = "antiphon.models.cards."
_library = torch.library.Library("antiphon_cards", "DEF")  # type: ignore[no-untyped-call]


def _rows_like(x: torch.Tensor, *_rest: object) -> torch.Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _half_as_wide(x: torch.Tensor, *_rest: object) -> torch.Tensor:
    return x.new_empty((x.shape[0], x.shape[1] // 2))


def _nothing(*_all: object) -> None:
    return None


def _attended(q: torch.Tensor, _k: torch.Tensor, v: torch.Tensor, *_rest: object) -> torch.Tensor:
    return q.new_empty((q.shape[0], q.shape[1], v.shape[2]))


def _summed(rows: torch.Tensor, *_rest: object) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty(rows.shape, dtype=rows.dtype, device=rows.device), rows.new_empty((), dtype=torch.int64)


def _chosen(logits: torch.Tensor, _bias: object, top_k: int, *_rest: object) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    shape = (logits.shape[0], top_k)
    return (
        logits.new_empty(shape, dtype=torch.int64),
        logits.new_empty(shape, dtype=torch.float32),
        logits.new_empty(shape[:1], dtype=torch.int32),
    )


_ATTENTION = "Tensor q, Tensor k_cache, Tensor v_cache, Tensor blocks, "
# name, arguments and result, module of the kernel, fake
_OPS: Sequence[tuple[str, str, str, Callable[..., Any]]] = (
    ("norm", "(Tensor x, Tensor weight, float eps) -> Tensor", "rows", _rows_like),
    ("add_norm", "(Tensor(a!) x, Tensor y, Tensor weight, float eps) -> Tensor", "rows", _rows_like),
    ("gated", "(Tensor gate_up, str activation) -> Tensor", "rows", _half_as_wide),
    (
        "rope_and_cache",
        (
            "(Tensor(a!) qkv, Tensor cos, Tensor sin, Tensor positions, Tensor slots, Tensor(b!) k_cache, Tensor(c!) v_cache, "
            "int num_heads, Tensor? q_norm, Tensor? k_norm, float eps) -> ()"
        ),
        "rope",
        _nothing,
    ),
    (
        "decode_attention",
        f"({_ATTENTION}Tensor lens, int block_size, float scale, int window, int num_parts) -> Tensor",
        "decode",
        _attended,
    ),
    (
        "prefill_attention",
        (
            f"({_ATTENTION}Tensor first_rows, Tensor num_rows, Tensor num_past, int max_rows, int block_size, float scale, "
            "int window) -> Tensor"
        ),
        "prefill",
        _attended,
    ),
    (
        "experts",
        (
            "(Tensor rows, Tensor ids, Tensor weights, Tensor gate_up, Tensor down, Tensor slot_of_id, str activation) "
            "-> (Tensor, Tensor)"
        ),
        "experts",
        _summed,
    ),
    (
        "gate",
        (
            "(Tensor logits, Tensor? bias, int top_k, bool sigmoid, bool renormalise, float scale, int num_groups, int num_kept, "
            "int counted) -> (Tensor, Tensor, Tensor)"
        ),
        "gate",
        _chosen,
    ),
)


def _kernel_of(module: str, name: str) -> Callable[..., Any]:
    found: list[Callable[..., Any]] = []

    def launch(*arguments: Any) -> Any:
        if not found:
            found.append(getattr(importlib.import_module(_KERNELS + module), name))
        return found[0](*arguments)

    return launch


def _register() -> None:
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    for name, signature, module, fake in _OPS:
        _library.define(name + signature)  # type: ignore[no-untyped-call]
        kernel = _kernel_of(module, name)
        _library.impl(name, kernel, "CUDA")  # type: ignore[no-untyped-call]
        _library.impl(name, kernel if interpreted else getattr(reference, name), "CPU")  # type: ignore[no-untyped-call]
        torch.library.register_fake(f"antiphon_cards::{name}", fake, lib=_library)


_register()
NAMES = tuple(name for name, *_rest in _OPS)
