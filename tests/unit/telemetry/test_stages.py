"""Stage figures are differences of sums, over windows in which something ran."""

import pytest

from antiphon.telemetry.stages import StageWindow, attention_figures, difference, ffn_figures

SUMS = {
    "num_steps": 10.0, "num_exchanges": 600.0, "sum_step_s": 1.0, "sum_engine_s": 1.05, "sum_attention_s": 0.3, "sum_send_s": 0.06,
    "sum_blocked_s": 0.2, "sum_round_trip_s": 0.6, "sum_ffn_compute_s": 0.42, "sum_ffn_wait_s": 0.06, "sum_head_s": 0.25,
    "sum_sample_s": 0.01,
}  # fmt: skip


def test_an_attention_workers_figures_are_per_exchange_and_per_step():
    figures = attention_figures(SUMS)
    assert figures["t_attention_s"] == pytest.approx(0.6e-3)
    assert figures["t_ffn_s"] == pytest.approx(0.7e-3)
    assert figures["t_transfer_s"] == pytest.approx(0.1e-3)  # (1 ms away - 0.7 computing - 0.1 queueing) / 2
    assert figures["bubble_share"] == pytest.approx(0.2)
    assert figures["ffn_hidden"] == 0.0
    assert figures["schedule_share"] == pytest.approx(0.05)
    assert figures["exchanges_per_step"] == 60


def test_the_ffn_is_hidden_once_it_takes_no_longer_than_attention():
    assert attention_figures({**SUMS, "sum_ffn_compute_s": 0.36})["ffn_hidden"] == 1.0


def test_an_ffn_workers_bubble_is_the_window_without_work():
    sums = {"sum_compute_s": 0.3, "sum_wait_s": 0.02, "sum_busy_s": 0.4, "sum_uptime_s": 0.5, "num_rows": 640, "num_batches": 20,
            "num_messages": 40}  # fmt: skip
    figures = ffn_figures(sums)
    assert figures["rows_per_batch"] == 32
    assert figures["t_ffn_s"] == pytest.approx(15e-3)
    assert figures["t_queue_s"] == pytest.approx(0.5e-3)
    assert figures["bubble_share"] == pytest.approx(0.2)


def test_nothing_is_said_of_a_window_without_a_step():
    assert attention_figures(difference(SUMS, SUMS)) == {}
    assert ffn_figures({}) == {}


def test_a_window_forgets_what_was_before_it_and_keeps_its_last_figures_while_idle():
    now = [0.0]
    window = StageWindow(attention_figures, clock=lambda: now[0])
    assert window.look(SUMS) == {}  # too short a window to say anything
    now[0] = 2.0
    assert window.look(SUMS)["t_ffn_s"] == pytest.approx(0.7e-3)
    now[0] = 4.0
    faster = {name: 2 * value for name, value in SUMS.items()} | {"sum_ffn_compute_s": 0.42 + 0.06}
    assert window.look(faster)["t_ffn_s"] == pytest.approx(0.1e-3)
    now[0] = 6.0
    assert window.look(faster)["t_ffn_s"] == pytest.approx(0.1e-3)
