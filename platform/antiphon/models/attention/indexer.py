"""Which tokens a row attends to: DeepSeek's lightning indexer (DeepSeek-V3.2-Exp's report §2.1) over a cache of small keys (hot).

    score(t, s) = sum over heads of w(t)·relu(q(t)·k(s))        k: one key a token, cached; q and w: of the row
    a row sees the K tokens of its context that score highest; of equal scores the earlier ones

The report's program turns q and k by a Hadamard matrix, which changes no product, and rounds them to 8 bits; here neither is done.
Legend: T rows, D hidden, N index heads, H their dims, C context, K tokens chosen. Must not know: what attends.
"""

from __future__ import annotations

import torch

from antiphon.models.config import IndexConfig
from antiphon.models.layers.functional import LayerNorm, Rope
from antiphon.models.layers.linear import Linear
from antiphon.models.loading.weights import Weights

_EPS = 1e-6  # of the norm on keys
_SCORES = 2**23  # of rows, heads and context worked out at once


class Indexer:
    """Keys for the cache, and choices for rows."""

    def __init__(self, config: IndexConfig, weights: Weights, prefix: str, rope: Rope) -> None:
        """``prefix``: of the indexer's tensors."""
        self._config = config
        self._rope = rope
        query, key = weights.read(prefix + "wq_b.weight"), weights.read(prefix + "wk.weight")
        norm, bias = weights.read(prefix + "k_norm.weight"), weights.read(prefix + "k_norm.bias")
        if config.interleaved:
            # Rotating neighbours against each other is rotating halves after a permutation, and q·k does not see one.
            order = _halves(config.head_dim, rope.rotary_dim)
            query = query.view(config.num_heads, config.head_dim, -1)[:, order].reshape(query.shape)
            key, norm, bias = key[order], norm[order], bias[order]
        self._query = Linear(query)
        self._key = Linear(key)
        self._key_norm = LayerNorm(norm, bias, _EPS)
        self._weight = Linear(weights.read(prefix + "weights_proj.weight"))

    @property
    def top_k(self) -> int:
        """Tokens that a row sees at most."""
        return self._config.top_k

    def keys(self, x_TD: torch.Tensor, tables: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """What is cached for the rows, [T, 1, H]."""
        return self._rope.rotate(self._key_norm(self._key(x_TD))[:, None], tables)

    def queries(
        self, low_TQ: torch.Tensor, x_TD: torch.Tensor, tables: tuple[torch.Tensor, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries [T, N, H] from the rows' normed low-rank q, and fp32 weights [T, N] of heads."""
        c = self._config
        q_TNH = self._rope.rotate(self._query(low_TQ).view(-1, c.num_heads, c.head_dim), tables)
        return q_TNH, self._weight(x_TD).float() * (c.num_heads * c.head_dim) ** -0.5

    def choose(
        self, q_TNH: torch.Tensor, w_TN: torch.Tensor, k_cache: torch.Tensor, slots_TC: torch.Tensor, seen_TC: torch.Tensor
    ) -> torch.Tensor:
        """Which of the tokens that a row may see it does see, bool [T, C].

        Args:
            q_TNH: Queries.
            w_TN: Weights of heads.
            k_cache: The plane of keys, [slots, 1, H].
            slots_TC: Where each row's context is; [1, C] where all rows have one.
            seen_TC: What a row may see.
        """
        num_rows, num_context = seen_TC.shape
        run = max(1, _SCORES // (num_context * self._config.num_heads))
        parts = []
        for first in range(0, num_rows, run):
            rows = slice(first, first + run)
            slots = slots_TC if slots_TC.shape[0] == 1 else slots_TC[rows]
            k_THC = k_cache[slots, 0].float().transpose(1, 2)
            scores_TNC = torch.matmul(q_TNH[rows].float(), k_THC).relu_()
            scores_TC = torch.matmul(w_TN[rows, None], scores_TNC).squeeze(1)
            parts.append(_best(scores_TC.masked_fill_(~seen_TC[rows], float("-inf")), self.top_k) & seen_TC[rows])
        return parts[0] if len(parts) == 1 else torch.cat(parts)


def _halves(head_dim: int, rotary_dim: int) -> torch.Tensor:
    """The dimensions of a head with the rotated ones, which lead, from (even, odd, even, ...) order into evens before odds."""
    dims = torch.arange(head_dim)
    return torch.cat((dims[0:rotary_dim:2], dims[1:rotary_dim:2], dims[rotary_dim:]))


def _best(scores_TC: torch.Tensor, top_k: int) -> torch.Tensor:
    """Where a row's K highest scores are, the first ones of equals: relu makes many equal, and wirings must choose alike."""
    if scores_TC.shape[1] <= top_k:
        return torch.ones_like(scores_TC, dtype=torch.bool)
    least_T1 = scores_TC.topk(top_k, dim=1).values[:, -1:]
    above_TC, equal_TC = scores_TC > least_T1, scores_TC == least_T1
    left_T1 = top_k - above_TC.sum(dim=1, keepdim=True)
    return above_TC | (equal_TC & (equal_TC.cumsum(dim=1) <= left_T1))
