"""What drafters may be told of the model's own work: last hidden states of tokens as steps compute them (hot).

Must not know: what becomes of them.
"""

from __future__ import annotations

from typing import Protocol

import torch

from antiphon.core.request import RequestId


class HiddenStates(Protocol):
    """Takes them. Belongs to the engine's loop."""

    def take(self, request_id: RequestId, first_token: int, hidden_RD: torch.Tensor) -> None:
        """Hidden states [R, D] behind the last norm, of a request's known tokens [first_token, first_token + R)."""
        ...
