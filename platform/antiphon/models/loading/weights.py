"""Reads one worker's tensors out of a checkpoint and remembers which (control speed: while a worker starts).

Must not know: families, what a tensor is for.
"""

from __future__ import annotations

import torch

from antiphon.core.errors import CheckpointInvalid
from antiphon.models.loading.checkpoint import Checkpoint
from antiphon.models.loading.stored.formats import is_four_bit, is_stored, read_four_bit, read_stored, shape_of
from antiphon.models.loading.stored.four_bit import FourBit


class Weights:
    """Reads named tensors of one worker and remembers which: what is resident is what was read here."""

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype = dtype
        self.device = device
        self.checkpoint = checkpoint
        self.resident_bytes: dict[str, int] = {}  # tensor name -> bytes held here

    def read(
        self,
        name: str,
        rows: tuple[int, int] | None = None,
        cols: tuple[int, int] | None = None,
        dtype: torch.dtype | None = None,
    ) -> torch.Tensor:
        """A tensor, or a slice of its rows and columns, in the worker's dtype unless told another.

        Raises:
            CheckpointInvalid: it is not there, or holds whole numbers where no format says what they stand for.
        """
        dtype = self.dtype if dtype is None else dtype
        if is_stored(self.checkpoint, name):
            tensor = read_stored(self.checkpoint, name, rows, cols, dtype)
        else:
            stored = self.checkpoint.dtype(name)
            if dtype.is_floating_point and not stored.is_floating_point:
                raise CheckpointInvalid(
                    f"{self.checkpoint.path}: tensor {name!r} is stored as {stored}: codes of an unknown format"
                )
            tensor = self.checkpoint.tensor(name, rows=rows, cols=cols, dtype=dtype)
        tensor = tensor.to(self.device)
        self.resident_bytes[name] = tensor.numel() * tensor.element_size()
        return tensor

    def is_four_bit(self, name: str) -> bool:
        """Whether ``part`` gives a matrix of four bits."""
        return self.device.type == "cpu" and is_four_bit(self.checkpoint, name)

    def part(self, name: str, rows: tuple[int, int] | None = None, cols: tuple[int, int] | None = None) -> torch.Tensor | FourBit:
        """``read`` of a matrix, in four bits where it is stored so and the CPU computes. Raises CheckpointInvalid."""
        if not self.is_four_bit(name):
            return self.read(name, rows, cols)
        matrix = read_four_bit(self.checkpoint, name, rows, cols)
        self.resident_bytes[name] = matrix.num_bytes
        return matrix

    def shape(self, name: str) -> tuple[int, ...]:
        """A whole tensor's shape. Raises CheckpointInvalid."""
        return shape_of(self.checkpoint, name)

    def hold(self, name: str, num_bytes: int) -> None:
        """Note how many bytes of a tensor stay, where that is not what was read."""
        self.resident_bytes[name] = num_bytes

    def rest(self) -> None:
        """Nothing is read for now: the file's pages shall not count as this worker's memory."""
        self.checkpoint.close()
