"""What the stages of a step take, from the sums that workers keep (control speed).

Workers only add up, since start; a figure belongs to a window, and is the difference of two looks. Names of sums and figures are
here, so that /metrics and ``antiphon bench`` mean the same. Must not know: who keeps the sums.

    attention worker                                  FFN worker
    t_attention_s   its work for one exchange         t_ffn_s          one batch
    t_ffn_s         the FFN's, as it reported         t_queue_s        a message's wait for its batch
    t_transfer_s    one way, at most: an answer       rows_per_batch
                    that waits to be looked at        bubble_share     of the window, without work
                    counts too
    bubble_share    of the step, waiting for the FFN
    ffn_hidden      1 when t_ffn_s <= t_attention_s

One exchange is one layer and ubatch.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

MIN_WINDOW_S = 1.0


def attention_figures(delta: Mapping[str, float]) -> dict[str, float]:
    """Figures of an attention worker between two looks at its sums; empty when no step lies between them."""
    exchanges, steps, step_s = (delta.get(name, 0.0) for name in ("num_exchanges", "num_steps", "sum_step_s"))
    if exchanges <= 0 or steps <= 0 or step_s <= 0:
        return {}
    attention_s = (delta["sum_attention_s"] + delta.get("sum_send_s", 0.0)) / exchanges
    ffn_s, queue_s, away_s = (delta[name] / exchanges for name in ("sum_ffn_compute_s", "sum_ffn_wait_s", "sum_round_trip_s"))
    return {
        "t_attention_s": attention_s,
        "t_ffn_s": ffn_s,
        "t_transfer_s": max(0.0, away_s - ffn_s - queue_s) / 2,
        "bubble_share": delta["sum_blocked_s"] / step_s,
        "ffn_hidden": float(ffn_s <= attention_s),
        "head_share": delta.get("sum_head_s", 0.0) / step_s,
        "sample_share": delta["sum_sample_s"] / step_s,
        "schedule_share": max(0.0, delta.get("sum_engine_s", 0.0) - step_s) / step_s,
        "exchanges_per_step": exchanges / steps,
    }


def ffn_figures(delta: Mapping[str, float]) -> dict[str, float]:
    """Figures of an FFN worker between two looks at its sums; empty when no batch lies between them."""
    batches, window_s = delta.get("num_batches", 0.0), delta.get("sum_uptime_s", 0.0)
    if batches <= 0 or window_s <= 0:
        return {}
    return {
        "t_ffn_s": delta["sum_compute_s"] / batches,
        "t_queue_s": delta["sum_wait_s"] / max(1.0, delta.get("num_messages", batches)),
        "rows_per_batch": delta["num_rows"] / batches,
        "bubble_share": min(1.0, max(0.0, 1.0 - delta["sum_busy_s"] / window_s)),
    }


def difference(last: Mapping[str, float], first: Mapping[str, float]) -> dict[str, float]:
    """What was added between two looks."""
    return {name: value - first.get(name, 0.0) for name, value in last.items()}


class StageWindow:
    """Figures of the last window of at least ``MIN_WINDOW_S`` in which something ran. Belongs to the thread that looks."""

    def __init__(
        self, figures: Callable[[Mapping[str, float]], dict[str, float]], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._figures = figures
        self._clock = clock
        self._since_s = clock()
        self._first: Mapping[str, float] = {}
        self._shown: dict[str, float] = {}

    def look(self, sums: Mapping[str, float]) -> Mapping[str, float]:
        """The figures now."""
        now_s = self._clock()
        if now_s - self._since_s >= MIN_WINDOW_S:
            found = self._figures(difference(sums, self._first))
            self._shown = found if found else self._shown
            self._first, self._since_s = dict(sums), now_s
        return self._shown
