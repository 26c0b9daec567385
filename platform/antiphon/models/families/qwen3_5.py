"""Qwen3.5, text, dense and with experts: Qwen3-Next's layers, their projections stored apart (control speed).

The published checkpoints have a vision tower and tensors that predict a second token ("mtp.") beside the text's, and the text's
config in a section of its own; text is what is served of them. A text's positions are equal in all three directions that the
rotation knows, so that it is the usual one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from antiphon.models.config import DecoderConfig, FFNConfig, GateConfig, MoEConfig, TensorNames
from antiphon.models.families.fields import Fields, activation, refuse
from antiphon.models.families.qwen3_next import hybrid
from antiphon.models.families.sparse import num_experts

_TEXT = ("Qwen3_5ForCausalLM", "Qwen3_5MoeForCausalLM")
_WITH_VISION = {"Qwen3_5ForConditionalGeneration": _TEXT[0], "Qwen3_5MoeForConditionalGeneration": _TEXT[1]}
ARCHITECTURES = (*_TEXT, *_WITH_VISION)

_OF_IMAGES = ("vision_config", "image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
_OF_POSITIONS = ("mrope_section", "mrope_interleaved")  # in space; text has none


def describe(raw: Mapping[str, Any]) -> DecoderConfig:
    """See families.describe."""
    name = raw["architectures"][0]
    if name in _WITH_VISION:
        return _text_of(raw, _WITH_VISION[name])
    refuse(raw, {"hidden_act": "silu", "attn_output_gate": True, "output_gate_type": "swish"})
    for field in ("mtp_num_hidden_layers", "mtp_use_dedicated_embeddings", "mamba_ssm_dtype", "mlp_only_layers"):
        _ = raw.get(field)  # the state is in fp32 here, whatever another program keeps it in
    num_layers = int(raw["num_hidden_layers"])
    rope = {key: value for key, value in (raw.get("rope_parameters") or {}).items() if key not in _OF_POSITIONS}
    section = _Section(raw, {"rope_parameters": rope})
    ffn: FFNConfig | MoEConfig
    if name == _TEXT[0]:
        ffn = FFNConfig(intermediate_size=int(raw["intermediate_size"]), activation=activation(raw))
        return hybrid(section, "qwen3_5", [ffn] * num_layers, form="split")
    ffn = MoEConfig(
        gate=GateConfig(num_experts=num_experts(raw), top_k=int(raw["num_experts_per_tok"]), renormalise=True),
        intermediate_size=int(raw["moe_intermediate_size"]),
        activation=activation(raw),
        shared_intermediate_size=int(raw["shared_expert_intermediate_size"]),
        has_shared_gate=True,
    )
    return hybrid(section, "qwen3_5_moe", [ffn] * num_layers, form="split")


class _Section(Mapping[str, Any]):
    """A config with some fields in other words; what is read here counts as read there."""

    def __init__(self, raw: Mapping[str, Any], instead: Mapping[str, Any]) -> None:
        self._raw = raw
        self._instead = instead

    def __getitem__(self, key: str) -> Any:
        value = self._raw[key]
        return self._instead.get(key, value)

    def __iter__(self) -> Any:
        return iter(self._raw)

    def __len__(self) -> int:
        return len(self._raw)


def _text_of(raw: Mapping[str, Any], name: str) -> DecoderConfig:
    for field in _OF_IMAGES:
        _ = raw.get(field)
    section = dict(raw["text_config"])
    for field in ("eos_token_id", "tie_word_embeddings"):
        outer = raw.get(field)
        if outer is not None:
            section[field] = outer
    text = Fields({**section, "architectures": [name]})
    config = describe(text)
    text.refuse_unread()
    prefix = "model.language_model."
    layers = tuple(replace(layer, prefix=f"{prefix}layers.{i}.") for i, layer in enumerate(config.layers))
    names = TensorNames(embed=prefix + "embed_tokens.weight", final_norm=prefix + "norm")
    return replace(config, layers=layers, names=names)
