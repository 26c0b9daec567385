"""Rows of a model to the vector that is asked for (step speed).

    embed   the mean, first or last row, of length 1 where the model says so
    score   a classification head on the first or last row, or the logits of given tokens

Legend: L rows of one text, D hidden, C classes. Must not know: batches, requests' ways.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from antiphon.core.errors import InvalidInput
from antiphon.core.request import Pooling
from antiphon.models.decoder import AttentionHalves
from antiphon.models.loading.checkpoint import Checkpoint
from antiphon.models.loading.weights import Weights
from antiphon.models.pooling.facts import PoolingFacts


def check_pooling(pooler: Pooler | None, pooling: Pooling | None) -> None:
    """Refuse what a model can't do; ``pooler`` is None where it generates.

    Raises:
        InvalidInput: a vector of a model that generates, or what ``Pooler.check`` refuses.
    """
    if pooler is not None:
        pooler.check(pooling)
    elif pooling is not None:
        raise InvalidInput("this model generates, it has no vectors", "model")


class Pooler:
    """The last part of a model that embeds or ranks. Sums are in fp32, whatever the rows are in."""

    def __init__(self, facts: PoolingFacts, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> None:
        """Reads the head, where there is one. Raises CheckpointInvalid."""
        self.facts = facts
        weights = Weights(checkpoint, dtype, device)
        self._dense: tuple[torch.Tensor, torch.Tensor] | None = None
        self._head: tuple[torch.Tensor, torch.Tensor | None] | None = None
        if facts.num_classes and facts.is_encoder:
            self._dense = (weights.read("bert.pooler.dense.weight"), weights.read("bert.pooler.dense.bias"))
            self._head = (weights.read("classifier.weight"), weights.read("classifier.bias"))
        elif facts.num_classes:
            bias = weights.read("score.bias") if "score.bias" in checkpoint.names else None
            self._head = (weights.read("score.weight"), bias)
        self.resident_bytes = weights.resident_bytes

    def check(self, pooling: Pooling | None) -> None:
        """Refuse what this model can't do.

        Raises:
            InvalidInput: it does not generate; or embeds and is asked to score, or the other way round.
        """
        if pooling is None:
            raise InvalidInput(f"this model does not generate, its task is {self.facts.task}", "model")
        if (pooling.kind == "embed") != (self.facts.task == "embed"):
            raise InvalidInput(f"this model's task is {self.facts.task}", "model")
        if pooling.kind == "score" and bool(pooling.token_ids) == bool(self.facts.num_classes):
            wanted = "a head of its own" if self.facts.num_classes else "tokens that stand for its scores"
            raise InvalidInput(f"this model ranks by {wanted}", "pooling.token_ids")

    def of_rows(self, x_LD: torch.Tensor) -> torch.Tensor:
        """The vector of an encoder's rows, fp32: [D] or [C]."""
        match self.facts.place:
            case "mean":
                x_D = x_LD.float().mean(dim=0)
            case "max":
                x_D = x_LD.float().amax(dim=0)
            case "cls":
                x_D = x_LD[0]
            case "last":
                x_D = x_LD[-1]
        return self._of_row(x_D)

    def of_last(self, halves: AttentionHalves, x_D: torch.Tensor, pooling: Pooling) -> torch.Tensor:
        """The vector of a decoder's last row of the residual stream, fp32: [D], [C], or one logit a token asked for."""
        if pooling.token_ids:
            return halves.logits(x_D[None])[0, list(pooling.token_ids)].float()
        return self._of_row(halves.hidden(x_D[None])[0])

    def _of_row(self, x_D: torch.Tensor) -> torch.Tensor:
        if self._dense is not None:
            x_D = torch.tanh(F.linear(x_D, *self._dense))
        if self._head is not None:
            return F.linear(x_D.to(self._head[0].dtype), *self._head).float()
        x_D = x_D.float()
        return F.normalize(x_D, dim=0) if self.facts.normalise else x_D
