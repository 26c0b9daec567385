"""Round trips between two processes over each transport, against the bounds that hidden exchanges need.

    python tests/bench/links.py [--transport shm --transport nixl] [--repeats 3] [--samples 2000]

Transports are measured in turn, interleaved; a JSON line per transport, size and mode with medians over the repeats, and a table.
``bound_us`` is what the layer exchange asks of 64 KB in place: 10 us over shared memory, 50 us over NIXL; ``ratio`` is to it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys

from antiphon.apps.bench.links import measure
from antiphon.core.errors import Unavailable

SIZES = (4 << 10, 64 << 10, 512 << 10)
BOUNDS_US = {("shm", 64 << 10, "in-place"): 10.0, ("nixl", 64 << 10, "in-place"): 50.0}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--transport", action="append", choices=("shm", "nixl", "grpc"))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--samples", type=int, default=2000)
    args = parser.parse_args()
    found: dict[tuple[str, int, str], list[tuple[float, float]]] = {}
    for _ in range(args.repeats):
        for transport in args.transport or ("shm", "nixl", "grpc"):
            try:
                for trip in measure(transport, SIZES, num_samples=args.samples):
                    found.setdefault((transport, trip.num_bytes, trip.mode), []).append((trip.median_us, trip.p99_us))
            except Unavailable as error:
                print(f"{transport}: {error}", file=sys.stderr)
    print(f"{'transport':10}{'bytes':>9}  {'mode':10}{'median us':>10}{'p99 us':>10}{'ratio':>8}")
    for (transport, size, mode), runs in found.items():
        median, p99 = (statistics.median(run[i] for run in runs) for i in (0, 1))
        line = {"bench": "links", "transport": transport, "bytes": size, "mode": mode, "median_us": median, "p99_us": p99}
        bound = BOUNDS_US.get((transport, size, mode))
        if bound is not None:
            line |= {"bound_us": bound, "ratio": median / bound}
        print(f"{transport:10}{size:9d}  {mode:10}{median:10.1f}{p99:10.1f}" + ("" if bound is None else f"{median / bound:8.2f}"))
        print(json.dumps(line))


if __name__ == "__main__":
    main()
