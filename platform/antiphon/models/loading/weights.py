"""Reads one worker's tensors out of a checkpoint and remembers which (control speed: while a worker starts).

Must not know: families, what a tensor is for.
"""

from __future__ import annotations

import torch

from antiphon.models.loading.block_scales import is_scaled, read_scaled
from antiphon.models.loading.checkpoint import Checkpoint


class Weights:
    """Reads named tensors of one worker and remembers which: what is resident is what was read here."""

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype = dtype
        self.device = device
        self._checkpoint = checkpoint
        self.resident_bytes: dict[str, int] = {}  # tensor name -> bytes held here

    def read(
        self,
        name: str,
        rows: tuple[int, int] | None = None,
        cols: tuple[int, int] | None = None,
        dtype: torch.dtype | None = None,
    ) -> torch.Tensor:
        """A tensor, or a slice of its rows and columns, in the worker's dtype unless told another. Raises CheckpointInvalid."""
        dtype = self.dtype if dtype is None else dtype
        if is_scaled(self._checkpoint, name):
            tensor = read_scaled(self._checkpoint, name, rows, cols, dtype)
        else:
            tensor = self._checkpoint.tensor(name, rows=rows, cols=cols, dtype=dtype)
        tensor = tensor.to(self.device)
        self.resident_bytes[name] = tensor.numel() * tensor.element_size()
        return tensor

    def hold(self, name: str, num_bytes: int) -> None:
        """Note how many bytes of a tensor stay, where that is not what was read."""
        self.resident_bytes[name] = num_bytes

    def rest(self) -> None:
        """Nothing is read for now: the file's pages shall not count as this worker's memory."""
        self._checkpoint.close()
