"""Modules for multi-token prediction that checkpoints hold behind their last layer (control speed).

Behind the model's layers two layouts are in use, told apart by where a module's norm is: beside the layer's tensors, or below
"transformer." (Step). The head is the model's where the family shares it, else the module's own. Qwen3-Next and Qwen3.5 have their
modules apart, under "mtp.": layers of full attention, between one pair of norms, one projection and one last norm for all of them.
Must not know: tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Any

from antiphon.core.errors import UnsupportedModel
from antiphon.models.config import DecoderConfig, PredictionConfig, TensorNames
from antiphon.models.families import deepseek, glm_moe, qwen3_5, qwen3_next, step3p7
from antiphon.models.families.fields import Fields

COUNT = "num_nextn_predict_layers"
_SHARES_HEAD: Mapping[str, bool] = {
    **dict.fromkeys(deepseek.ARCHITECTURES, True),
    **dict.fromkeys(glm_moe.ARCHITECTURES, True),
    **dict.fromkeys(step3p7.ARCHITECTURES, False),
}
_APART = (*qwen3_next.ARCHITECTURES, *qwen3_5.ARCHITECTURES)
_LISTED = ("layer_types", "mlp_layer_types", "indexer_types")  # of DeepSeek and GLM: they say what follows from other fields


def describe_prediction(
    raw: Mapping[str, Any], names: Collection[str], describe: Callable[[Mapping[str, Any]], DecoderConfig]
) -> tuple[PredictionConfig, ...]:
    """The modules of a checkpoint, in order.

    Args:
        raw: its ``config.json``.
        names: of its tensors.
        describe: ``families.describe``.

    Raises:
        UnsupportedModel: the family has none that are known, the checkpoint has none, or their tensors are not all there.
    """
    if any(name in _APART for name in raw.get("architectures") or ()):
        return _apart(raw, names, describe)
    architecture = next((name for name in raw.get("architectures") or () if name in _SHARES_HEAD), None)
    if architecture is None:
        known = ", ".join(sorted([*_SHARES_HEAD, *_APART]))
        raise UnsupportedModel(f"no layers for multi-token prediction are known of this family; known: {known}", "architectures")
    text = dict(raw["text_config"]) if isinstance(raw.get("text_config"), Mapping) else dict(raw)
    num_layers, count = int(text["num_hidden_layers"]), int(text.get(COUNT) or 0)
    if count < 1:
        raise UnsupportedModel("the checkpoint has no layers for multi-token prediction", COUNT)
    if architecture not in step3p7.ARCHITECTURES:
        text = {key: value for key, value in text.items() if key not in _LISTED}
    else:
        architecture = "Step3p5ForCausalLM"
    # The module's layer is the one that the model would have next.
    longer = {**text, "architectures": [architecture], "num_hidden_layers": num_layers + count, COUNT: 0}
    config = describe(Fields(longer))
    return tuple(_module(config, num_layers + i, names, shares_head=_SHARES_HEAD[architecture]) for i in range(count))


def _module(config: DecoderConfig, index: int, names: Collection[str], *, shares_head: bool) -> PredictionConfig:
    layer = config.layers[index]
    inner = layer.prefix + ("transformer." if layer.prefix + "transformer.shared_head.norm.weight" in names else "")
    head = config.names.lm_head
    if not shares_head:
        candidates = (inner + "shared_head.output", inner + "shared_head.head")
        head = next((name for name in candidates if name + ".weight" in names), head)
    module = PredictionConfig(
        decoder=replace(
            config,
            layers=(layer,),
            names=TensorNames(embed=config.names.embed, final_norm=inner + "shared_head.norm", lm_head=head),
        ),
        embedding_norm=layer.prefix + "enorm",
        hidden_norm=layer.prefix + "hnorm",
        projection=layer.prefix + "eh_proj",
    )
    return _whole(module, names)


def _apart(
    raw: Mapping[str, Any], names: Collection[str], describe: Callable[[Mapping[str, Any]], DecoderConfig]
) -> tuple[PredictionConfig, ...]:
    """Configs say little of these modules, and those of Qwen3-Next nothing: as many as there are are used."""
    count = 0
    while f"mtp.layers.{count}.input_layernorm.weight" in names:
        count += 1
    if count < 1:
        raise UnsupportedModel("the checkpoint has no layers for multi-token prediction", "mtp_num_hidden_layers")
    section = dict(raw["text_config"]) if isinstance(raw.get("text_config"), Mapping) else dict(raw)
    section |= {"num_hidden_layers": count, "layer_types": ["full_attention"] * count}
    section |= {name: value for name, value in (("mlp_only_layers", []), ("decoder_sparse_step", 1)) if name in section}
    config = describe(Fields({**raw, "text_config": section} if "text_config" in raw else section))
    config = replace(config, names=replace(config.names, final_norm="mtp.norm"))
    return tuple(
        _whole(
            PredictionConfig(
                decoder=replace(config, layers=(replace(layer, prefix=f"mtp.layers.{i}."),)),
                embedding_norm="mtp.pre_fc_norm_embedding",
                hidden_norm="mtp.pre_fc_norm_hidden",
                projection="mtp.fc",
                hands_on_normed=True,
            ),
            names,
        )
        for i, layer in enumerate(config.layers)
    )


def _whole(module: PredictionConfig, names: Collection[str]) -> PredictionConfig:
    """The same, whose own tensors are there."""
    for name in (module.embedding_norm, module.hidden_norm, module.projection, module.decoder.names.final_norm):
        if name + ".weight" not in names:
            raise UnsupportedModel(f"{name}.weight is not there, which the layers for multi-token prediction need", COUNT)
    return module
