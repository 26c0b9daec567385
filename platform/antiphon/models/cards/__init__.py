"""Kernels for graphics cards, each a registered op with a torch reference, a fake and a Triton implementation (hot).

Imported only where a card is used; ``ops`` is the door, and the one place that knows which implementation serves. Must not know:
families, workers, what a step is.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch


def kernels() -> Any:
    """The ops, registered by the first who asks."""
    importlib.import_module("antiphon.models.cards.ops")
    return torch.ops.antiphon_cards
