"""A card's memory as one of the workers that share it may use it (control speed).

    |<------------------------------ total -------------------------------->|
    |<------- share x total: what this worker may fill ------->|  others'   |
    | held: weights | peak: while a step computes |    room    |

Shares are of the whole card, never of what is free just now: that depends on who started first. What is free is only compared with
the share, so that a worker whose share others hold already says so at its start. Must not know: what the memory is for.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from antiphon.core.errors import InvalidInput

GIB = float(2**30)


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryFigures:
    """Bytes, at one moment. ``free``: as the driver sees it, of all processes; ``held`` and ``peak``: of this process alone."""

    total: int
    free: int
    held: int
    peak: int


@dataclass(frozen=True, slots=True, kw_only=True)
class CardMemory:
    """The memory of one card. ``share``: of all of it, what this worker may fill; ``field``: the document's, that says so."""

    device: torch.device
    share: float
    field: str

    @property
    def budget_bytes(self) -> int:
        """What this worker may fill: weights, KV blocks, states, recordings, and what a step needs while it computes."""
        return int(self.look().total * self.share)

    def look(self) -> MemoryFigures:
        """The figures now."""
        free, total = torch.cuda.mem_get_info(self.device)
        held, peak = torch.cuda.memory_reserved(self.device), torch.cuda.max_memory_reserved(self.device)
        return MemoryFigures(total=int(total), free=int(free), held=int(held), peak=int(peak))

    def settle(self) -> MemoryFigures:
        """Give back what the allocator keeps and nobody uses, and count the peak from here on."""
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self.device)
        return self.look()

    def check_free(self) -> None:
        """Compare what is left of the share with what is free.

        Raises:
            InvalidInput: others hold some of it; names the field, with the figures.
        """
        now = self.look()
        if now.held + now.free < self.budget_bytes:
            others = now.total - now.free - now.held
            raise InvalidInput(
                f"{self.field}: this worker may fill {shown(self.budget_bytes)} of its card ({self.share:g} of {shown(now.total)}) "
                f"and other workers and the driver hold {shown(others)}: at most {(now.total - others) / now.total:.2f} can be had",
                self.field,
            )


def shown(num_bytes: float) -> str:
    """Bytes for people."""
    return f"{num_bytes / GIB:.2f} GiB"
