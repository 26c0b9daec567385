"""Integer weights of four bits in 32-bit words: GPTQ, AWQ and compressed-tensors' pack-quantized checkpoints (control speed).

    GPTQ        qweight [I/8, O]      qzeros [G, O/8], one less than they are   scales [G, O]   g_idx [I]
    AWQ         qweight [I, O/8]      qzeros [G, O/8]                           scales [G, O]   a word has the outputs 0246 1357
    compressed  weight_packed [O, I/8], weight_shape   weight_zero_point [O/8, G]   weight_scale [O, G]   weight_g_idx [I]

All have the lowest bits first. What a code stands for: ``four_bit``. Must not know: what a weight is for.
"""

from __future__ import annotations

import torch

from antiphon.core.errors import CheckpointInvalid
from antiphon.models.loading.block_scales import CONFIG_FIELD
from antiphon.models.loading.checkpoint import Checkpoint
from antiphon.models.loading.stored.four_bit import FourBit, packed

Span = tuple[int, int] | None

_WORD = 8  # codes of a word
_AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # where in a word the outputs 0, 1, 2... are
_SUFFIXES = {"gptq": ".qweight", "awq": ".qweight", "compressed-tensors": ".weight_packed"}


def is_packed(checkpoint: Checkpoint, name: str) -> bool:
    """Whether the matrix ``name`` is stored in words."""
    suffix = _SUFFIXES.get(str(_section(checkpoint).get("quant_method")))
    return suffix is not None and name.endswith(".weight") and name.removesuffix(".weight") + suffix in checkpoint.names


def packed_shape(checkpoint: Checkpoint, name: str) -> tuple[int, int]:
    """Outputs and inputs. Raises CheckpointInvalid."""
    stem, method = name.removesuffix(".weight"), _section(checkpoint)["quant_method"]
    if method == "compressed-tensors":
        outputs, inputs = checkpoint.tensor(stem + ".weight_shape").tolist()
        return int(outputs), int(inputs)
    first, second = checkpoint.shape(stem + ".qweight")
    return (second, first * _WORD) if method == "gptq" else (second * _WORD, first)


def read_packed(checkpoint: Checkpoint, name: str, rows: Span, cols: Span) -> FourBit:
    """The matrix ``name``, or some of its outputs and inputs.

    Raises:
        CheckpointInvalid: a tensor that belongs to it is missing, or has another shape.
    """
    num_outputs, num_inputs = packed_shape(checkpoint, name)
    rows = (0, num_outputs) if rows is None else rows
    if not 0 <= rows[0] <= rows[1] <= num_outputs:
        raise CheckpointInvalid(f"{checkpoint.path}: rows {rows[0]}:{rows[1]} lie outside {name!r} of {num_outputs}")
    read = {"gptq": _gptq, "awq": _awq, "compressed-tensors": _compressed}[str(_section(checkpoint)["quant_method"])]
    matrix = read(checkpoint, name.removesuffix(".weight"), (num_outputs, num_inputs), rows)
    return matrix if cols is None else matrix.cols(*cols)


def _gptq(checkpoint: Checkpoint, stem: str, shape: tuple[int, int], rows: tuple[int, int]) -> FourBit:
    section, (num_outputs, num_inputs) = _section(checkpoint), shape
    size = _group_size(section, num_inputs)
    words_OW = checkpoint.tensor(stem + ".qweight", cols=rows).T.contiguous()
    zeros_GO = _zeros(checkpoint, stem, num_outputs, tuple(range(_WORD)))
    if section.get("checkpoint_format", "gptq") != "gptq_v2":
        zeros_GO = (zeros_GO + 1) & 15
    groups = None
    if stem + ".g_idx" in checkpoint.names:
        checkpoint.expect(stem + ".g_idx", (num_inputs,))
        groups = checkpoint.tensor(stem + ".g_idx", dtype=torch.int64)
        if torch.equal(groups, torch.arange(num_inputs) // size):
            groups = None
    return _integers(checkpoint, stem, words_OW.view(torch.uint8), zeros_GO, shape, rows, size, groups)


def _awq(checkpoint: Checkpoint, stem: str, shape: tuple[int, int], rows: tuple[int, int]) -> FourBit:
    num_outputs, num_inputs = shape
    first = rows[0] // _WORD
    words_IW = checkpoint.tensor(stem + ".qweight", cols=(first, -(-rows[1] // _WORD)))
    codes_OI = _codes(words_IW, _AWQ_ORDER)[:, rows[0] - first * _WORD : rows[1] - first * _WORD].T
    zeros_GO = _zeros(checkpoint, stem, num_outputs, _AWQ_ORDER)
    size = _group_size(_section(checkpoint), num_inputs)
    return _integers(checkpoint, stem, packed(codes_OI), zeros_GO, shape, rows, size, None)


def _integers(
    checkpoint: Checkpoint,
    stem: str,
    codes_OB: torch.Tensor,
    zeros_GO: torch.Tensor,
    shape: tuple[int, int],
    rows: tuple[int, int],
    size: int,
    groups: torch.Tensor | None,
) -> FourBit:
    checkpoint.expect(stem + ".scales", (-(-shape[1] // size), shape[0]))
    return FourBit(
        kind="integer",
        codes_OB=codes_OB,
        num_inputs=shape[1],
        scale_OG=checkpoint.tensor(stem + ".scales", cols=rows).T.contiguous(),
        low_OG=zeros_GO[:, rows[0] : rows[1]].T.contiguous(),
        group_size=size,
        group_of_I=groups,
    )


def _compressed(checkpoint: Checkpoint, stem: str, shape: tuple[int, int], rows: tuple[int, int]) -> FourBit:
    num_outputs, num_inputs = shape
    checkpoint.expect(stem + ".weight_packed", (num_outputs, -(-num_inputs // _WORD)))
    words_OW = checkpoint.tensor(stem + ".weight_packed", rows=rows)
    scale_OG = checkpoint.tensor(stem + ".weight_scale").reshape(-1, checkpoint.shape(stem + ".weight_scale")[-1])
    scale_OG = scale_OG.expand(num_outputs, -1) if scale_OG.shape[0] == 1 else scale_OG
    num_groups = scale_OG.shape[1]
    size = -(-num_inputs // num_groups)
    if scale_OG.shape[0] != num_outputs or -(-num_inputs // size) != num_groups:
        raise CheckpointInvalid(f"{checkpoint.path}: {stem}.weight_scale has shape {list(scale_OG.shape)} for {list(shape)}")
    low_OG = None
    if stem + ".weight_zero_point" in checkpoint.names:
        zeros = checkpoint.tensor(stem + ".weight_zero_point")
        if zeros.dtype is torch.int32 and zeros.shape[0] != num_outputs:  # eight outputs a word
            low_OG = _codes(zeros.T.contiguous(), tuple(range(_WORD))).T[:num_outputs]
        else:
            low_OG = (zeros.reshape(-1, num_groups).expand(num_outputs, -1) + 8).to(torch.uint8)
        low_OG = low_OG[rows[0] : rows[1]].contiguous()
    groups = None
    if stem + ".weight_g_idx" in checkpoint.names:
        groups = checkpoint.tensor(stem + ".weight_g_idx", dtype=torch.int64)
        if bool((groups < 0).any()) or torch.equal(groups, torch.arange(num_inputs) // size):
            groups = None  # in their own order
    return FourBit(
        kind="integer",
        codes_OB=words_OW.view(torch.uint8)[:, : -(-num_inputs // 2)].contiguous(),
        num_inputs=num_inputs,
        scale_OG=scale_OG[rows[0] : rows[1]].contiguous(),
        low_OG=low_OG,
        group_size=size,
        group_of_I=groups,
    )


def _zeros(checkpoint: Checkpoint, stem: str, num_outputs: int, order: tuple[int, ...]) -> torch.Tensor:
    return _codes(checkpoint.tensor(stem + ".qzeros"), order)[:, :num_outputs]


def _codes(words: torch.Tensor, order: tuple[int, ...]) -> torch.Tensor:
    """Codes [rows, 8 a word] of int32 words; ``order``: where in a word each is."""
    shifts = torch.tensor([4 * place for place in order], dtype=torch.int32)
    return ((words[..., None] >> shifts) & 15).flatten(-2).to(torch.uint8)


def _group_size(section: dict[str, object], num_inputs: int) -> int:
    size = section.get("group_size", 128)
    return num_inputs if not isinstance(size, int) or size < 1 else size


def _section(checkpoint: Checkpoint) -> dict[str, object]:
    return checkpoint.config.get(CONFIG_FIELD) or {}
