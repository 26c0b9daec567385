"""What the hot path keeps: links' slots are taken, never made, and nothing that a step made outlives it."""

from __future__ import annotations

import gc
import tracemalloc
from pathlib import Path

from antiphon.testing import LocalCluster, wiring, write_tiny_llama

HOT = ("connectors/afd", "transport", "worker/layer_loop", "worker/ffn_worker", "worker/batching", "models")
WARM, MEASURED = 8, 24  # decode steps
SLACK_BYTES = 4096  # of counters that outgrow small integers, and dictionaries at their last resize


def test_exchanges_leave_nothing_behind_once_they_are_warm(tmp_path: Path) -> None:
    checkpoint = write_tiny_llama(tmp_path)
    with LocalCluster(wiring(checkpoint, "afd"), checkpoint) as cluster:
        cluster.submit([1, 2, 3], max_tokens=WARM + MEASURED + 8)
        for _ in range(WARM):
            cluster.step()
        side = cluster.generating[0].worker.afd
        free, exchanges = side.num_free_slots, side.times.num_exchanges
        tracemalloc.start()
        try:
            cluster.step()
            before = taken()
            for _ in range(MEASURED):
                cluster.step()
            grown = taken() - before
        finally:
            tracemalloc.stop()
        assert side.times.num_exchanges - exchanges >= MEASURED, "the path that is measured was run"
        assert side.num_free_slots == free
        assert grown <= SLACK_BYTES, f"{grown} bytes are kept after {MEASURED} steps"


def taken() -> int:
    """Bytes that Python's allocators hold on behalf of the hot path's files."""
    gc.collect()
    found = tracemalloc.take_snapshot().statistics("filename")
    return sum(s.size for s in found if any(f"/antiphon/{part}" in s.traceback[0].filename for part in HOT))
