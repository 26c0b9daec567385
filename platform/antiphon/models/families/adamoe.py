"""AdaMoE (arXiv 2406.13233) on Mixtral: null experts among the choices: tokens take as many as they need (control speed).

The router has ``num_null_experts`` rows behind the experts'; a chosen null expert does nothing, and the weights of the others
sum to one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from antiphon.models.config import DecoderConfig, MoEConfig
from antiphon.models.families import mixtral

ARCHITECTURES = ("AdaMoEMixtralForCausalLM",)


def describe(raw: Mapping[str, Any]) -> DecoderConfig:
    """See families.describe."""
    num_null = int(raw["num_null_experts"])
    base = mixtral.describe(raw)
    layers = []
    for layer in base.layers:
        assert isinstance(layer.ffn, MoEConfig)
        layers.append(replace(layer, ffn=replace(layer.ffn, gate=replace(layer.ffn.gate, num_null=num_null))))
    return replace(base, family="adamoe", layers=tuple(layers))
