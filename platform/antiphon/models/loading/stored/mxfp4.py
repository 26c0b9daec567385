"""MXFP4 experts as gpt-oss publishes them: blocks of 32 values in 16 bytes, a power of two for each (control speed).

    NAME_blocks  uint8 [E, O, I/32, 16]      the lower half of a byte comes first
    NAME_scales  uint8 [E, O, I/32]          127 more than the exponent

Must not know: what the outputs are.
"""

from __future__ import annotations

from antiphon.core.errors import CheckpointInvalid
from antiphon.models.loading.checkpoint import Checkpoint
from antiphon.models.loading.stored.four_bit import FourBit

_BLOCK = 32


def is_mxfp4(checkpoint: Checkpoint, name: str) -> bool:
    """Whether the experts ``name`` are stored this way."""
    return name + "_blocks" in checkpoint.names


def read_mxfp4(checkpoint: Checkpoint, name: str, expert: int, shape: tuple[int, int, int], rows: tuple[int, int]) -> FourBit:
    """Outputs ``rows`` of one expert.

    Args:
        checkpoint: Where the experts are.
        name: Of the tensor that they would be without quantisation.
        expert: Which one.
        shape: Experts, outputs and inputs that the config needs.
        rows: First and one-past-last output.

    Raises:
        CheckpointInvalid: there are no such tensors, or their shapes are others.
    """
    num_experts, num_outputs, num_inputs = shape
    if num_inputs % _BLOCK:
        raise CheckpointInvalid(f"{checkpoint.path}: {name!r} has {num_inputs} inputs, which are no blocks of {_BLOCK}")
    num_blocks = num_inputs // _BLOCK
    checkpoint.expect(name + "_blocks", (num_experts, num_outputs, num_blocks, _BLOCK // 2))
    checkpoint.expect(name + "_scales", (num_experts, num_outputs, num_blocks))
    which = (expert, expert + 1)
    return FourBit(
        kind="e2m1",
        codes_OB=checkpoint.tensor(name + "_blocks", rows=which, cols=rows)[0].flatten(1),
        num_inputs=num_inputs,
        scale_OG=checkpoint.tensor(name + "_scales", rows=which, cols=rows)[0],
        group_size=_BLOCK,
    )
