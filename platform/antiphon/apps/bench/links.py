"""Round trips over each transport between two processes, by size (hot, measured; control speed around it).

"in place": the payload lies in the slot already and is not copied at either end, as rows are handed over. "copy": it is copied into
the slot at each end. Must not know: what links carry.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from antiphon.core.errors import Unavailable
from antiphon.core.ids import Epoch, WorkerId
from antiphon.transport.base import HEADER_BYTES, Hello, Link, LinkLayout, Listener
from antiphon.transport.connect.choose import open_transport

NUM_SLOTS = 4
START_TIMEOUT_S = 40.0
ANSWER_TIMEOUT_S = 20.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundTrip:
    """One figure: microseconds from commit to the answer's arrival."""

    transport: str
    num_bytes: int
    mode: str  # in-place, copy
    median_us: float
    p99_us: float
    num_samples: int


def hello(worker: str, slot_bytes: int) -> Hello:
    """The hello of either end; their layouts are equal."""
    layout = LinkLayout(
        channel="bench", num_slots=NUM_SLOTS, send_slot_bytes=slot_bytes, recv_slot_bytes=slot_bytes, fields=(("use", "bench"),)
    )
    return Hello(worker_id=WorkerId(worker), epoch=Epoch(1), layout=layout)


def measure(
    transport: str, sizes: Sequence[int], *, num_samples: int = 2000, modes: Sequence[str] = ("in-place", "copy")
) -> Iterator[RoundTrip]:
    """Round trips of every size and mode over ``transport``.

    Raises:
        Unavailable: the transport does not work here.
    """
    slot_bytes = max(sizes)
    torch.set_num_threads(1)
    cores = sorted(os.sched_getaffinity(0))
    mine, theirs = (cores[0], cores[1]) if len(cores) > 1 else (-1, -1)
    for mode in modes:
        listener = open_transport(transport).listen("127.0.0.1", lambda _hello: hello("bench/near/0", slot_bytes))
        command = [sys.executable, "-m", "antiphon.apps.bench.echo", listener.address, str(slot_bytes), mode, str(theirs)]
        process = subprocess.Popen(command)
        try:
            link = _accept(listener, process)
            if mine >= 0:
                os.sched_setaffinity(0, {mine})
            payload = torch.randint(0, 255, (slot_bytes,), dtype=torch.uint8)
            for size in sizes:
                samples = _samples(link, size, max(50, num_samples // max(1, size >> 18)), mode, payload)
                yield RoundTrip(
                    transport=transport,
                    num_bytes=size,
                    mode=mode,
                    median_us=statistics.median(samples) * 1e6,
                    p99_us=samples[int(0.99 * (len(samples) - 1))] * 1e6,
                    num_samples=len(samples),
                )
            link.close()
        finally:
            os.sched_setaffinity(0, cores)
            listener.close()
            process.terminate()
            process.wait(10)


def _accept(listener: Listener, process: subprocess.Popen[bytes]) -> Link:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        link = listener.accept()
        if link is not None:
            return link
        if process.poll() is not None:
            raise Unavailable(f"the far end stopped with {process.returncode}")
        time.sleep(0.01)
    raise Unavailable("the far end did not connect")


def _samples(link: Link, size: int, count: int, mode: str, payload: torch.Tensor) -> list[float]:
    header = bytes(HEADER_BYTES)
    samples = []
    for turn in range(count + count // 10 + 10):
        slot = link.acquire()
        assert slot is not None  # one message is in flight, and there are more slots
        start = time.perf_counter()
        if mode == "copy":
            slot.data[:size].copy_(payload[:size])
        link.commit(slot, header, size)
        while (message := link.poll()) is None:
            if not link.wait(ANSWER_TIMEOUT_S):
                raise Unavailable(f"no answer within {ANSWER_TIMEOUT_S:g} s")
        if mode == "copy":
            payload[:size].copy_(message.data)
        took = time.perf_counter() - start
        link.release(message)
        if turn >= count // 10 + 10:  # the first tenth warms up
            samples.append(took)
    samples.sort()
    return samples
