"""Measures this machine as if it were an accelerator: matrix products and memory reads, in a few seconds (control speed).

Single precision only: numpy has no product in bf16 or fp8, so those formats are not measured and plans for ``local`` compute in
fp32. Must not know: models.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import psutil

from antiphon.planner.cost.hardware import Accelerator

GEMM_SIZE = 1024
MATRIX_ROWS = 8192  # 256 MiB of fp32: far larger than any cache
SECONDS_EACH = 2.0
MIN_REPEATS = 3


def _best_s(work: Callable[[], object], seconds: float, clock: Callable[[], float]) -> float:
    """Shortest of the repeats that fit into ``seconds``; the first one warms up."""
    work()
    best, end = float("inf"), clock() + seconds
    repeats = 0
    while repeats < MIN_REPEATS or clock() < end:
        start = clock()
        work()
        best = min(best, clock() - start)
        repeats += 1
    return best


def measure_local(
    usd_per_hour: float | None = None,
    seconds_each: float = SECONDS_EACH,
    clock: Callable[[], float] = time.perf_counter,
) -> Accelerator:
    """This machine, all processors together, as one card called ``local``.

    Args:
        usd_per_hour: Its price, if it should enter cost comparisons.
        seconds_each: Time for each of the two measurements.
        clock: Seconds, monotonic.
    """
    rng = np.random.default_rng(0)
    left = rng.standard_normal((GEMM_SIZE, GEMM_SIZE), dtype=np.float32)
    product = np.empty_like(left)
    gemm_s = _best_s(lambda: np.matmul(left, left, out=product), seconds_each, clock)
    matrix = np.ones((MATRIX_ROWS, MATRIX_ROWS), dtype=np.float32)
    vector = np.ones(MATRIX_ROWS, dtype=np.float32)
    result = np.empty(MATRIX_ROWS, dtype=np.float32)
    gemv_s = _best_s(lambda: np.matmul(matrix, vector, out=result), seconds_each, clock)
    bandwidth = matrix.nbytes / gemv_s
    return Accelerator(
        key="local",
        title=f"this machine, {psutil.cpu_count()} processors",
        flops={"fp32": 2.0 * GEMM_SIZE**3 / gemm_s},
        memory_bytes=float(psutil.virtual_memory().total),
        bandwidth=bandwidth,
        # Peers share this machine's memory: a message is written once and read once.
        scale_up_bandwidth=bandwidth / 2,
        nic_bandwidth=bandwidth / 2,
        cards_per_node=1,
        usd_per_hour=usd_per_hour,
        source="measured: fp32 matrix product, memory read by a matrix-vector product; bf16 and fp8 are not measured",
    )
