"""How a decoder's KV and states are laid out in the cache (control speed). Must not know: how either is computed."""

from __future__ import annotations

import torch

from antiphon.core.errors import UnsupportedModel
from antiphon.core.kv import KVLayout
from antiphon.models.config import (
    DecoderConfig,
    DeltaConfig,
    ShortConvConfig,
)


def kv_layout(config: DecoderConfig, dtype: torch.dtype, block_size_tokens: int) -> KVLayout:
    """How this decoder's KV and states are laid out.

    Raises:
        UnsupportedModel: layers that cache per token cache different things, or those that have states have different ones.
    """
    name = str(dtype).removeprefix("torch.")
    mixers = [layer.attention for layer in config.layers]
    with_state = {
        i: mixer.states(name, dtype.itemsize) for i, mixer in enumerate(mixers) if isinstance(mixer, DeltaConfig | ShortConvConfig)
    }
    planes = {mixer.planes for i, mixer in enumerate(mixers) if i not in with_state}
    states = set(with_state.values())
    if len(planes) > 1 or len(states) > 1:
        raise UnsupportedModel("layers that differ in what they keep of a token or of a sequence are not supported", "layer_types")
    return KVLayout(
        num_layers=config.num_layers,
        planes=next(iter(planes), ()),
        block_size_tokens=block_size_tokens,
        dtype=name,
        itemsize_bytes=dtype.itemsize,
        states=next(iter(states), ()),
        state_layers=tuple(with_state),
    )
