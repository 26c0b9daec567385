"""Work that is recorded once and then started as a whole: a card's graph, and its stand-in on a CPU (step speed).

    recorded = graphs.record(run)      run() is called; what it does to tensors is kept, its result's memory too
    ... inputs are written into the tensors that run() read ...
    recorded.replay()                  the same again, into the same memory, with no Python of the model

Whatever would ask the host for a tensor's value ends the recording with NotRecordable: on a card it would be an error of the driver
or, worse, a constant. The stand-in is as unkind. Must not know: what is recorded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

import torch
from torch.utils._python_dispatch import TorchDispatchMode

Result = TypeVar("Result")

# What makes a host wait for a tensor's value, or the shape of a result depend on it.
_SYNCS = frozenset(
    ("_local_scalar_dense", "item", "is_nonzero", "nonzero", "masked_select", "unique", "_unique2", "bincount", "equal")
)


class NotRecordable(Exception):
    """The work asked the host for a tensor's value."""


class Recorded(Protocol):
    """Work that can be done again."""

    def replay(self) -> None:
        """Do it again; on a card, in the current stream's order."""
        ...


class Graphs(Protocol):
    """A way to record work."""

    def record(self, run: Callable[[], Result]) -> tuple[Recorded, Result]:
        """Run and record; the result's tensors are what every replay writes into. Raises NotRecordable."""
        ...


def is_sync(func: Any) -> bool:
    """Whether an operator asks the host for a tensor's value."""
    return str(func.overloadpacket.__name__) in _SYNCS


class _Tape(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.entries: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if is_sync(func):
            raise NotRecordable(f"{func} asks the host for a value")
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if not func.is_view or not _shares_memory(out, args):  # "to" and "reshape" are views where nothing is to be done
            self.entries.append((func, args, kwargs, out))
        return out


class _Played:
    """A tape that can be played. Operators that write in place are run again; results of others go where they went before."""

    def __init__(self, entries: Sequence[tuple[Any, tuple[Any, ...], dict[str, Any], Any]]) -> None:
        self._entries = tuple(entries)

    @property
    def num_operators(self) -> int:
        """Operators on it."""
        return len(self._entries)

    def replay(self) -> None:
        """See ``Recorded``."""
        with torch.inference_mode():  # tensors made in it may be written in it alone
            for func, args, kwargs, before in self._entries:
                now = func(*args, **kwargs)
                for new, old in zip(_tensors(now), _tensors(before), strict=True):
                    if new is not old and new.data_ptr() != old.data_ptr():
                        old.copy_(new)


class TapeGraphs:
    """The stand-in on a CPU."""

    def record(self, run: Callable[[], Result]) -> tuple[_Played, Result]:
        """See ``Graphs``."""
        tape = _Tape()
        with tape:
            result = run()
        return _Played(tape.entries), result


class CudaGraphs:
    """Graphs of one card, all of whose memory is one pool: record the largest first."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool: Any = None

    def record(self, run: Callable[[], Result]) -> tuple[Recorded, Result]:
        """See ``Graphs``. Runs once before, on a stream of its own, so that nothing is compiled or allocated while it records."""
        stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            run()
        torch.cuda.current_stream(self._device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        try:
            # Other threads (the lease asks for free memory) may use the card meanwhile.
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                result = run()
        except RuntimeError as error:
            raise NotRecordable(str(error)) from error
        self._pool = graph.pool()
        return graph, result


def _shares_memory(out: Any, args: tuple[Any, ...]) -> bool:
    """Whether a view's result is in its first argument's memory."""
    given = {tensor.untyped_storage().data_ptr() for tensor in _tensors(args[:1])}
    return all(tensor.untyped_storage().data_ptr() in given for tensor in _tensors(out))


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, tuple | list):
        return [tensor for part in value for tensor in _tensors(part)]
    return []
