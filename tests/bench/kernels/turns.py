"""Two calls timed in turns, for the benches beside this file: processor seconds of this thread; other load disturbs little."""

import statistics
import time
from collections.abc import Callable

import torch

Call = Callable[[], torch.Tensor]


def seconds_of(call: Call, times: int) -> float:
    """Processor seconds of one call, the mean of ``times``."""
    start_s = time.thread_time()
    for _ in range(times):
        call()
    return (time.thread_time() - start_s) / times


def in_turns(theirs: Call, ours: Call, *, rounds: int, round_s: float) -> str:
    """Median microseconds of both, theirs over ours, and the lowest and highest of that ratio; a round takes about ``round_s``."""
    theirs()  # warms up
    times = max(2, int(round_s / max(1e-6, seconds_of(ours, 2))))
    pairs = [(seconds_of(theirs, times), seconds_of(ours, times)) for _ in range(rounds)]
    ratios = [their / our for their, our in pairs]
    their_us, our_us = (statistics.median(column) * 1e6 for column in zip(*pairs, strict=True))
    return f"{their_us:>11.0f} {our_us:>11.0f}   {statistics.median(ratios):.2f} [{min(ratios):.2f}, {max(ratios):.2f}]"
