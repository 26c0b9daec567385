"""What a model is made of, from config and checkpoint headers alone: parameters by role, KV bytes, pools (control speed).

No tensor is read. Must not know: how it is shown.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from antiphon.core.errors import CheckpointInvalid
from antiphon.core.ids import FFNShard, slice_bounds
from antiphon.models.attention.kv_cache import TORCH_DTYPES
from antiphon.models.cache_layout import kv_layout
from antiphon.models.config import DecoderConfig, FFNConfig, LayerConfig, MoEConfig
from antiphon.models.experts.placement import ExpertPlacement
from antiphon.models.loading.checkpoint import Checkpoint
from antiphon.models.loading.stored.formats import shape_of, stands_for


@dataclass(frozen=True, slots=True, kw_only=True)
class Inventory:
    """Counts over one model."""

    family: str
    num_layers: int
    num_sparse_layers: int
    num_experts: int  # routed, of the first sparse layer; 0 = dense
    experts_per_row: int
    attention_parameters: int  # embeddings, attention, norms, gates and head: what an attention worker holds
    dense_ffn_parameters: int
    expert_parameters: int  # routed
    shared_parameters: int
    prediction_parameters: int  # of layers that predict further tokens: in the checkpoint, and in none of the other counts
    active_parameters: int  # that one token computes with (embedding looked up, not computed)
    kv_token_bytes: int  # all layers
    state_bytes: int  # of a sequence at one place, all layers; 0 where no layer has a state
    itemsize_bytes: int  # of a weight in the format that was asked about

    @property
    def parameters(self) -> int:
        """All of them."""
        return self.attention_parameters + self.dense_ffn_parameters + self.expert_parameters + self.shared_parameters


def take_inventory(config: DecoderConfig, checkpoint: Checkpoint, dtype: str) -> Inventory:
    """Count the tensors that workers of this model would hold in format ``dtype`` (bfloat16, float32).

    Raises:
        CheckpointInvalid: a tensor that the config asks for is not there.
    """
    dense = experts = shared = active = 0
    for number, ffn in enumerate(config.ffns):
        layer = config.layers[number % config.num_layers]
        if isinstance(ffn, FFNConfig):
            dense += _dense(config, ffn)
            active += _dense(config, ffn)
            names = layer.names
            _expect(checkpoint, layer.prefix + names.ffn + names.up + ".weight", (ffn.intermediate_size, config.hidden_size))
        elif isinstance(ffn, MoEConfig):
            one = 3 * config.hidden_size * ffn.intermediate_size
            one += 2 * ffn.intermediate_size + config.hidden_size if ffn.bias else 0
            common = 3 * config.hidden_size * ffn.shared_intermediate_size
            experts += one * ffn.gate.num_experts
            shared += common
            active += one * ffn.gate.top_k + common
    attention = sum(math.prod(shape_of(checkpoint, name)) for name in _attention_names(config, checkpoint))
    embedding = config.vocab_size * config.hidden_size
    sparse = [ffn for ffn in config.ffns if isinstance(ffn, MoEConfig)]
    layout = kv_layout(config, TORCH_DTYPES[dtype], 1)
    return Inventory(
        family=config.family,
        num_layers=config.num_layers,
        num_sparse_layers=len(sparse),
        num_experts=sparse[0].gate.num_experts if sparse else 0,
        experts_per_row=sparse[0].gate.top_k if sparse else 0,
        attention_parameters=attention,
        dense_ffn_parameters=dense,
        expert_parameters=experts,
        shared_parameters=shared,
        prediction_parameters=sum(math.prod(shape_of(checkpoint, name)) for name in _prediction_names(config, checkpoint)),
        active_parameters=active + attention - (0 if config.tie_embeddings else embedding),
        kv_token_bytes=layout.token_bytes,
        state_bytes=layout.state_bytes,
        itemsize_bytes=TORCH_DTYPES[dtype].itemsize,
    )


def ffn_shard_bytes(config: DecoderConfig, shard: FFNShard, placement: ExpertPlacement, itemsize_bytes: int) -> int:
    """Bytes of weights that the FFN worker of ``shard`` holds."""
    total = 0
    for number, ffn in enumerate(config.ffns):
        if isinstance(ffn, FFNConfig):
            low, high = slice_bounds(ffn.intermediate_size, shard.index, shard.num_shards)
            total += 3 * config.hidden_size * (high - low)
        elif isinstance(ffn, MoEConfig):
            for expert in placement.held(ffn, number, shard.expert_index):
                width = ffn.shared_intermediate_size if expert == ffn.gate.num_experts else ffn.intermediate_size
                low, high = slice_bounds(width, shard.tensor_index, shard.num_tensor)
                total += 3 * config.hidden_size * (high - low)
    return total * itemsize_bytes


def _expect(checkpoint: Checkpoint, name: str, shape: tuple[int, int]) -> None:
    found = shape_of(checkpoint, name)
    if found != shape:
        raise CheckpointInvalid(f"{checkpoint.path}: tensor {name!r} has shape {list(found)}, but the config needs {list(shape)}")


def _dense(config: DecoderConfig, ffn: FFNConfig) -> int:
    biases = 2 * ffn.intermediate_size + config.hidden_size if ffn.bias else 0
    return 3 * config.hidden_size * ffn.intermediate_size + biases


def _attention_names(config: DecoderConfig, checkpoint: Checkpoint) -> Iterable[str]:
    """Every tensor of the checkpoint that is part of the model and of no FFN."""
    wanted = {layer.prefix for layer in config.layers}
    ffn_prefixes = tuple({prefix for layer in config.layers for prefix in _ffn_prefixes(layer)})
    gates = {layer.prefix + name for layer in config.layers for name in _gate_names(layer)}
    top = (config.names.embed, config.names.final_norm + ".", *(() if config.tie_embeddings else (config.names.lm_head + ".",)))
    for name in filter(None, map(stands_for, checkpoint.names)):
        in_layer = any(name.startswith(prefix) for prefix in wanted)
        if name.startswith(top) or (in_layer and (name in gates or not name.startswith(ffn_prefixes))):
            yield name


def _prediction_names(config: DecoderConfig, checkpoint: Checkpoint) -> Iterable[str]:
    """Tensors of layers for multi-token prediction: below "mtp.", or numbered on behind the last layer."""
    stem = config.layers[0].prefix.removesuffix("0.")
    for name in filter(None, map(stands_for, checkpoint.names)):
        number = name.removeprefix(stem).partition(".")[0] if name.startswith(stem) else ""
        if name.startswith("mtp.") or ".mtp." in name or (number.isdigit() and int(number) >= config.num_layers):
            yield name


def _ffn_prefixes(layer: LayerConfig) -> list[str]:
    names = layer.names
    whole = names.stacked_experts if names.fused_experts is None else names.fused_experts
    expert = names.expert.partition("{e}")[0] if whole is None else whole
    return [layer.prefix + prefix for prefix in (names.ffn, expert, names.shared)]


def _gate_names(layer: LayerConfig) -> list[str]:
    names, found = layer.names, []
    for moe in (layer.ffn, layer.shortcut):
        if isinstance(moe, MoEConfig):
            found.append(names.router)
            found += [names.router_bias] if moe.gate.has_logit_bias else []
            found += [names.correction_bias] if moe.gate.has_correction_bias else []
            found += [names.expert_scale] if moe.gate.has_expert_scale else []
            found += [names.shared_gate] if moe.has_shared_gate else []
    return found
