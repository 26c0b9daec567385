"""The gated delta rule in plain torch: the reference, and the path on machines without our kernels (hot).

Per head, with S [K, V] in fp32, decay a = exp(g) per head or per channel of the key, and k and q of length one:

    S <- a·S        u = beta (v - S^T k)        S <- S + k u^T        out = S^T q

A chunk of C tokens solves for all u at once (arXiv 2406.06484 §3.2, 2412.06464 §3.3; per channel 2510.26692 §3). With G the running
sum of g, D_ij = exp(G_i - G_j) for i >= j, and strict lower triangle L of beta_i (k_i·D_ij k_j):

    (I + L) U = beta (V - exp(G) K S)      Out = exp(G) Q S + tril(Q·D K^T) U      S <- exp(G_C) S + (exp(G_C - G) K)^T U

Every exponent is at most zero. Legend: T tokens, N heads, K key dims, V value dims, C chunk, g last 1 or K.
Must not know: slots, projections.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

HEAD_CHUNK = 64  # tokens solved at once with a decay per head
CHANNEL_CHUNK = 16  # and per channel, where each pair of tokens needs K exponents


@dataclass(frozen=True, slots=True, kw_only=True)
class DeltaInputs:
    """What the rule takes of each row, all fp32."""

    q_TNK: torch.Tensor
    k_TNK: torch.Tensor
    v_TNV: torch.Tensor
    g_TNg: torch.Tensor
    beta_TN: torch.Tensor

    def rows(self, start: int, end: int) -> DeltaInputs:
        """Of rows [start, end)."""
        return DeltaInputs(
            q_TNK=self.q_TNK[start:end],
            k_TNK=self.k_TNK[start:end],
            v_TNV=self.v_TNV[start:end],
            g_TNg=self.g_TNg[start:end],
            beta_TN=self.beta_TN[start:end],
        )


def delta_step(x: DeltaInputs, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A token of each of T sequences with states [T, N, K, V], fp32: out [T, N, V] and the new states."""
    states = states * x.g_TNg.exp().unsqueeze(-1)
    u_TNV = (x.v_TNV - torch.einsum("tnkv,tnk->tnv", states, x.k_TNK)) * x.beta_TN.unsqueeze(-1)
    states = states + x.k_TNK.unsqueeze(-1) * u_TNV.unsqueeze(-2)
    return torch.einsum("tnkv,tnk->tnv", states, x.q_TNK), states


def delta_chunks(x: DeltaInputs, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Consecutive tokens of one sequence with state [N, K, V], fp32: out [T, N, V] and the new state."""
    size = HEAD_CHUNK if x.g_TNg.shape[-1] == 1 else CHANNEL_CHUNK
    parts = []
    for start in range(0, x.q_TNK.shape[0], size):
        rows = x.rows(start, start + size)
        q, k, v, g = (each.transpose(0, 1) for each in (rows.q_TNK, rows.k_TNK, rows.v_TNV, rows.g_TNg))
        beta = rows.beta_TN.t().unsqueeze(-1)
        total = g.cumsum(1)
        decay, left = total.exp(), (total[:, -1:] - total).exp()
        lower = (_pairs(k, k, total) * beta).tril(-1)
        u = torch.linalg.solve_triangular(lower, beta * (v - (k * decay) @ state), upper=False, unitriangular=True)
        parts.append(((q * decay) @ state + _pairs(q, k, total).tril() @ u).transpose(0, 1))
        state = state * decay[:, -1].unsqueeze(-1) + (k * left).transpose(1, 2) @ u
    return torch.cat(parts), state


def _pairs(a_NCK: torch.Tensor, k_NCK: torch.Tensor, total_NCg: torch.Tensor) -> torch.Tensor:
    """a_i·(D_ij k_j) for i >= j, [N, C, C]; above the diagonal anything finite."""
    later = torch.clamp(total_NCg.unsqueeze(2) - total_NCg.unsqueeze(1), max=0.0).exp()
    if later.shape[-1] == 1:
        return (a_NCK @ k_NCK.transpose(1, 2)) * later.squeeze(-1)
    return torch.einsum("nik,njk,nijk->nij", a_NCK, k_NCK, later)


def causal_conv(window_TC: torch.Tensor, weight_WC: torch.Tensor, bias_C: torch.Tensor | None = None) -> torch.Tensor:
    """A causal convolution per channel: ``window_TC`` starts W - 1 inputs before the first output. fp32 [T - W + 1, C]."""
    num_taps = weight_WC.shape[0]
    num_rows = window_TC.shape[0] - num_taps + 1
    out = window_TC[:num_rows].float() * weight_WC[0]
    for tap in range(1, num_taps):
        out.addcmul_(window_TC[tap : tap + num_rows].float(), weight_WC[tap])
    return out if bias_C is None else out.add_(bias_C)


def unit(x: torch.Tensor) -> torch.Tensor:
    """Vectors of length one, as the models were trained: x / sqrt(x·x + 1e-6)."""
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)


def decay(raw: torch.Tensor, bias: torch.Tensor, rate: torch.Tensor) -> torch.Tensor:
    """g = rate · softplus(raw + bias), at most zero since ``rate`` is negative; fp32."""
    return rate * F.softplus(raw.float() + bias)
