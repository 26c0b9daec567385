"""Attention workers per FFN worker in closed form, from stage times that are linear in their load (pure arithmetic).

    t_A = alpha_A T + beta_A    T: cached tokens of one attention worker, B (mean context)
    t_C                         one exchange
    t_F = alpha_F r B + beta_F  r attention workers with B rows each

A cycle lasts max(t_A, t_C, t_F); rB rows of r + 1 workers leave it. Must not know: models or hardware.
"""

from __future__ import annotations

from dataclasses import dataclass

from antiphon.planner.cost.formula import formula
from antiphon.planner.pipeline.barrier import expected_max, slowest_context


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearTimes:
    """Coefficients of one stage each."""

    attention_per_token_s: float
    attention_fixed_s: float
    ffn_per_row_s: float
    ffn_fixed_s: float
    exchange_s: float

    def cycle_s(self, ratio: float, batch: float, tokens: float) -> float:
        """Seconds of a cycle."""
        attention = self.attention_per_token_s * tokens + self.attention_fixed_s
        return max(attention, self.exchange_s, self.ffn_per_row_s * ratio * batch + self.ffn_fixed_s)

    def rows_per_worker_s(self, ratio: float, batch: float, tokens: float) -> float:
        """Rows per second and worker, all r + 1 counted."""
        return ratio * batch / (self.cycle_s(ratio, batch, tokens) * (ratio + 1))


@formula("", stage_s="s", ffn_fixed_s="s", ffn_per_row_s="s/row", batch="row")
def filling_ratio(*, stage_s: float, ffn_fixed_s: float, ffn_per_row_s: float, batch: float) -> float:
    """Attention workers whose rows keep the FFN busy just as long as another stage lasts."""
    return (stage_s - ffn_fixed_s) / (ffn_per_row_s * batch)


@formula("", ffn_fixed_s="s", ffn_per_row_s="s/row", batch="row")
def amortising_ratio(*, ffn_fixed_s: float, ffn_per_row_s: float, batch: float) -> float:
    """Where adding attention workers stops paying for the FFN's fixed time."""
    return (ffn_fixed_s / (ffn_per_row_s * batch)) ** 0.5  # type: ignore[no-any-return]  # a float's power


def optimal_ratio(times: LinearTimes, batch: float, tokens: float) -> float:
    """The ratio with the most rows per worker: the greatest of the attention, exchange and FFN bounds."""
    shared = {"ffn_fixed_s": times.ffn_fixed_s, "ffn_per_row_s": times.ffn_per_row_s, "batch": batch}
    attention_s = times.attention_per_token_s * tokens + times.attention_fixed_s
    return max(
        filling_ratio(stage_s=attention_s, **shared),
        filling_ratio(stage_s=times.exchange_s, **shared),
        amortising_ratio(**shared),
    )


def optimal_ratio_with_barrier(
    times: LinearTimes, batch: float, mean_context: float, deviation: float, max_ratio: int = 256
) -> int:
    """The whole ratio with the most rows per worker when the FFN waits for the slowest of r attention workers.

    Args:
        times: Coefficients.
        batch: Rows per attention worker.
        mean_context: Tokens per row.
        deviation: Standard deviation of the context over rows, in tokens.
        max_ratio: Largest ratio considered.
    """

    def rate(ratio: int) -> float:
        context = slowest_context(mean=mean_context, deviation=deviation, rows=batch, slowest=expected_max(ratio))
        return times.rows_per_worker_s(ratio, batch, batch * context)

    return max(range(1, max_ratio + 1), key=rate)
