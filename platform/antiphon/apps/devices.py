"""Deals this machine's cards out to the workers of documents that are served here together (control speed, pure).

Each worker gets one card; several may share one as long as their shares of its memory (``gpuMemoryUtilization``) fit beside each
other. On a cluster Ray does this, and nothing here is asked. Must not know: how workers are started.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from antiphon.core.device import memory_share
from antiphon.core.document.spec import LLMDeployment
from antiphon.core.errors import InvalidInput
from antiphon.device.driver import Cards

_ROUNDING = 1e-9  # shares such as 0.45 + 0.55 need not add up to 1 exactly


def deal(deployments: Sequence[LLMDeployment], look: Callable[[], Cards]) -> dict[tuple[str, str], tuple[str, ...]]:
    """The card of each worker, by (deployment, pool) and index, in the driver's words; pools on the CPU have no entry.

    Args:
        deployments: what is served together.
        look: finds the cards; called only where a document asks for one.

    Raises:
        InvalidInput: a worker's card is not there; the message names the field.
    """
    wanting = [
        (document, number, pool)
        for document in deployments
        for number, pool in enumerate(document.spec.pools)
        if pool.worker_device == "cuda" and pool.replicas
    ]
    if not wanting:
        return {}
    found = look()
    free = {card.visible: 1.0 for card in found.cards}
    dealt: dict[tuple[str, str], tuple[str, ...]] = {}
    for document, number, pool in wanting:
        field = f"{document.kind}/{document.metadata.name}: spec.pools[{number}].resources.gpu"
        if not free:
            why = f"pool {pool.name} asks for a card and {found.why_none}; with gpu: 0 it computes on the CPU"
            raise InvalidInput(f"{field}: {why}", field)
        share = memory_share(pool)
        mine = []
        for _ in range(pool.replicas):
            card = max(free, key=lambda name: free[name])  # the emptiest; the first of equals
            if free[card] + _ROUNDING < share:
                why = (
                    f"{pool.replicas} workers of pool {pool.name} ask for {share:g} of a card's memory each and this machine's "
                    f"{len(free)} have not that much left; a smaller gpuMemoryUtilization lets workers share a card"
                )
                raise InvalidInput(f"{field}: {why}", field)
            free[card] -= share
            mine.append(card)
        dealt[document.metadata.name, pool.name] = tuple(mine)
    return dealt
