"""Parts that mixture-of-experts families share: which layers are sparse, and the layers themselves (control speed)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from antiphon.core.errors import UnsupportedModel
from antiphon.models.config import AttentionConfig, FFNConfig, LatentAttentionConfig, LayerConfig, LayerNames, MoEConfig

MIXTRAL_NAMES = LayerNames(
    router="block_sparse_moe.gate.weight",
    expert="block_sparse_moe.experts.{e}.",
    expert_gate="w1",
    expert_up="w3",
    expert_down="w2",
)
DEEPSEEK_NAMES = LayerNames(shared="mlp.shared_experts.")


def num_experts(raw: Mapping[str, Any]) -> int:
    """Routed experts, under any of the names in use; two names that disagree are refused."""
    found = {key: int(raw[key]) for key in ("num_experts", "num_local_experts", "n_routed_experts") if raw.get(key) is not None}
    if not found:
        raise KeyError("num_experts")
    if len(set(found.values())) > 1:
        said = ", ".join(f"{key} = {count}" for key, count in found.items())
        raise UnsupportedModel(f"the number of experts is said twice, and differently: {said}", next(iter(found)))
    return next(iter(found.values()))


def qwen_sparse_layers(raw: Mapping[str, Any]) -> list[bool]:
    """Which layers have experts, as the Qwen families say it."""
    step, dense = int(raw.get("decoder_sparse_step") or 1), set(raw.get("mlp_only_layers") or ())
    return [i not in dense and (i + 1) % step == 0 for i in range(int(raw["num_hidden_layers"]))]


def first_dense_layers(raw: Mapping[str, Any], *, default: int = 0) -> list[bool]:
    """Which layers have experts, as DeepSeek's configs and their relatives say it; ``default``: dense ones where they don't."""
    told = raw.get("first_k_dense_replace")
    first, step = default if told is None else int(told), int(raw.get("moe_layer_freq") or 1)
    return [i >= first and i % step == 0 for i in range(int(raw["num_hidden_layers"]))]


def listed_sparse_layers(raw: Mapping[str, Any], *, default_first: int = 0) -> list[bool]:
    """Which layers have experts: as ``mlp_layer_types`` lists them, else all behind the first ``first_k_dense_replace``.

    Raises:
        UnsupportedModel: the two disagree, or a layer is of a third kind.
    """
    kinds, first = raw.get("mlp_layer_types"), raw.get("first_k_dense_replace")
    if kinds is not None:
        if set(kinds) - {"sparse", "dense"} or len(kinds) != int(raw["num_hidden_layers"]):
            raise UnsupportedModel(f"mlp_layer_types = {kinds!r} are not supported", "mlp_layer_types")
        listed = [kind == "sparse" for kind in kinds]
        if first is not None and listed != first_dense_layers(raw):
            raise UnsupportedModel("mlp_layer_types say otherwise than first_k_dense_replace: keep one of them", "mlp_layer_types")
        return listed
    return first_dense_layers(raw, default=default_first)


def mixed_layers(
    is_sparse: Sequence[bool],
    attention: AttentionConfig | LatentAttentionConfig,
    dense: FFNConfig | None,
    moe: MoEConfig,
    *,
    names: LayerNames | None = None,
    windows: Sequence[int | None] | None = None,
) -> list[LayerConfig]:
    """Layers with a mixture of experts where ``is_sparse`` says so, with the dense FFN elsewhere."""
    layers = []
    for i, sparse in enumerate(is_sparse):
        each = attention
        if windows is not None and windows[i] is not None and isinstance(each, AttentionConfig):
            each = replace(each, sliding_window=windows[i])
        ffn = moe if sparse else dense
        if ffn is None:
            raise KeyError("intermediate_size")
        layers.append(LayerConfig(attention=each, ffn=ffn, names=LayerNames() if names is None else names))
    return layers
