"""Decoders that embed or rank: their family's halves without the head (control speed).

Must not know: processes, requests.
"""

from __future__ import annotations

from dataclasses import replace

from antiphon.models.config import DecoderConfig, TensorNames
from antiphon.models.families import describe
from antiphon.models.loading.checkpoint import Checkpoint
from antiphon.models.pooling.facts import decoder_config

_BARE = "embed_tokens.weight"  # a checkpoint that was written from the model below its head
_PREFIX = "model."


def headless(checkpoint: Checkpoint) -> DecoderConfig:
    """The decoder of a checkpoint that may have no LM head, whose names may lack the prefix that a head gives them.

    Raises:
        UnsupportedModel: as ``families.describe``.
    """
    config = describe(decoder_config(checkpoint.config))
    if _BARE in checkpoint.names:
        names = config.names
        config = replace(
            config,
            names=TensorNames(
                embed=names.embed.removeprefix(_PREFIX),
                final_norm=names.final_norm.removeprefix(_PREFIX),
                lm_head=names.lm_head,
            ),
            layers=tuple(replace(layer, prefix=layer.prefix.removeprefix(_PREFIX)) for layer in config.layers),
        )
    if f"{config.names.lm_head}.weight" not in checkpoint.names:
        config = replace(config, tie_embeddings=True, lm_head_bias=False)  # nobody asks for logits; and the memory is there already
    return config
