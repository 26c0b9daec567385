"""A worker's device, opened once when the worker is built: the CPU, or the one card that it may see (control speed).

Asking for a card where none can be used is refused in one sentence; nothing falls back to the CPU. Must not know: what is computed.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Literal

import torch

from antiphon.core.errors import InvalidInput
from antiphon.device.memory import CardMemory

# A process with this variable takes its CPU for a card: the cards' paths run, on kernels' references. For tests and debugging.
PRETENDS = os.environ.get("ANTIPHON_PRETEND_CARD") == "1"
MIN_CAPABILITY = (8, 0)  # the oldest that our kernels are compiled for: bfloat16 matrix units and asynchronous copies


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """Where a worker computes. ``memory``: of its card; None = the host's, of which documents say how much a worker takes."""

    torch: torch.device
    memory: CardMemory | None = None

    @property
    def is_card(self) -> bool:
        """Whether it is a card."""
        return self.torch.type == "cuda"


def is_card(device: torch.device) -> bool:
    """Whether the cards' paths serve tensors of ``device``."""
    return PRETENDS or device.type == "cuda"


CPU = Device(torch=torch.device("cpu"))


def open_device(kind: Literal["cpu", "cuda"], memory_share: float, field: str) -> Device:
    """The device of one worker. ``field``: the document's field that asks for it.

    Raises:
        InvalidInput: it asks for a card, and none can be used by this process.
    """
    if kind == "cpu":
        return CPU
    if not torch.cuda.is_available():
        why = "shows it no card" if torch.version.cuda else f"{torch.__version__} computes on CPUs only"
        raise InvalidInput(f"{field}: the worker asks for a card and its torch {why}; with gpu: 0 it computes on the CPU", field)
    capability = torch.cuda.get_device_capability(0)
    if capability < MIN_CAPABILITY:
        name, (major, minor) = torch.cuda.get_device_name(0), capability
        needed = ".".join(map(str, MIN_CAPABILITY))
        raise InvalidInput(f"{field}: {name} has compute capability {major}.{minor}, {needed} or newer is needed", field)
    torch.cuda.set_device(0)
    torch.cuda.set_per_process_memory_fraction(memory_share, 0)  # the allocator refuses what is beyond, weights and KV alike
    torch.backends.cuda.matmul.allow_tf32 = False  # fp32 weights are served in fp32
    torch.backends.cudnn.allow_tf32 = False
    where = torch.device("cuda", 0)
    return Device(torch=where, memory=CardMemory(device=where, share=memory_share, field=f"{field}MemoryUtilization"))
