"""A card whose memory figures are given: torch's questions about a card's memory, answered from what this process allocates.

Every tensor that operators make while the account is open counts, as a caching allocator counts it: until nobody holds its storage.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode


class FakeCard(TorchDispatchMode):
    """``total`` bytes, ``others`` of them held by other processes; ``budget``: allocations beyond are refused, None = never."""

    def __init__(self, total: int, others: int = 0, budget: int | None = None) -> None:
        super().__init__()
        self.total, self.others, self.budget = total, others, budget
        self.held = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else (made,):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage(), func)
        return made

    def _count(self, storage: torch.UntypedStorage, func: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.held += size
        self.peak = max(self.peak, self.held)
        weakref.finalize(storage, self._gone, key, size)
        if self.budget is not None and self.held > self.budget and not func.is_view:
            raise torch.OutOfMemoryError("the fake card is full")

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.held -= size

    def answer(self, patch: pytest.MonkeyPatch) -> FakeCard:
        """Answer for ``torch.cuda``."""

        def reset(_device: object = None) -> None:
            self.peak = self.held

        answers: dict[str, Callable[..., object]] = {
            "mem_get_info": lambda _device=None: (self.total - self.others - self.held, self.total),
            "memory_reserved": lambda _device=None: self.held,
            "max_memory_reserved": lambda _device=None: self.peak,
            "reset_peak_memory_stats": reset,
            "empty_cache": lambda: None,
        }
        for name, function in answers.items():
            patch.setattr(torch.cuda, name, function)
        return self
