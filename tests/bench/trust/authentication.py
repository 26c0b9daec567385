"""What it costs that parts prove themselves: gRPC round trips with and without TLS, interleaved; opening a link; a start's keys.

    python tests/bench/trust/authentication.py [--repeats 5] [--samples 1000]

Each pair of runs, one with the certificates that parts have and one in plain text, is of two processes on a processor each. JSON
lines with medians over the pairs: microseconds of a round trip, CPU microseconds of both ends together, and the ratio of each to
plain text. Shared memory and NIXL have no such line: an open link proves nothing any more, which a test counts
(tests/contract/test_transport_links.py); theirs is ``open_us``, the proofs at a link's opening. ``identity_ms`` is a process' own
certificate, once.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

SIZES = (4 << 10, 64 << 10, 512 << 10)
TIMEOUT_S = 120.0


def in_plain_text() -> None:
    """Let the exchange's streams of this process go without certificates."""
    import grpc

    from antiphon.rpc import raw_stream

    library: Any = grpc
    server = library.server

    def plain_server(*args: Any, **options: Any) -> Any:
        made: Any = server(*args, **options)
        made.add_secure_port = lambda address, _credentials: made.add_insecure_port(address)
        return made

    library.secure_channel = lambda target, _credentials, options=None: library.insecure_channel(target, options=options)
    library.server = plain_server
    assert raw_stream.__dict__["grpc"] is library  # it takes both from there


def echo_main(mode: str, address: str, core: int) -> None:
    """The far end."""
    from antiphon.apps.bench.echo import main

    if mode == "plain":
        in_plain_text()
    main(address, max(SIZES), "in-place", core)


def cpu_s(pid: int) -> float:
    """CPU time of a process so far."""
    with open(f"/proc/{pid}/stat") as file:
        fields = file.read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def near_main(mode: str, num_samples: int) -> None:
    """One run; a JSON line."""
    import torch

    from antiphon.apps.bench.links import hello
    from antiphon.transport.base import HEADER_BYTES
    from antiphon.transport.connect.choose import open_transport

    if mode == "plain":
        in_plain_text()
    torch.set_num_threads(1)
    cores = sorted(os.sched_getaffinity(0))
    listener = open_transport("grpc").listen("127.0.0.1", lambda _hello: hello("bench/near/0", max(SIZES)))
    far = subprocess.Popen([sys.executable, __file__, "--echo", mode, listener.address, "--core", str(cores[-1])])
    try:
        end = time.monotonic() + TIMEOUT_S
        while (link := listener.accept()) is None:
            if time.monotonic() > end or far.poll() is not None:
                raise SystemExit("the far end did not connect")
            time.sleep(0.01)
        os.sched_setaffinity(0, {cores[0]})
        found = {}
        for size in SIZES:
            samples = []
            count = max(50, num_samples // max(1, size >> 17))
            for turn in range(count + 20):
                if turn == 20:  # warm
                    began_cpu_s = cpu_s(os.getpid()) + cpu_s(far.pid)
                slot = link.acquire()
                assert slot is not None  # one message is in flight, and there are more slots
                began_s = time.perf_counter()
                link.commit(slot, bytes(HEADER_BYTES), size)
                while (message := link.poll()) is None:
                    link.wait(TIMEOUT_S)
                if turn >= 20:
                    samples.append(time.perf_counter() - began_s)
                link.release(message)
            both_s = cpu_s(os.getpid()) + cpu_s(far.pid) - began_cpu_s
            found[size] = [statistics.median(samples) * 1e6, both_s / count * 1e6]
        print(json.dumps(found))
        link.close()
    finally:
        listener.close()
        far.terminate()
        far.wait(10)


@contextmanager
def proven_pair() -> Iterator[float]:
    """Both ends of a socket prove themselves; the seconds that it took."""
    from antiphon.transport.connect.proof import accept_proven, connect_proven

    near, far = socket.socketpair()
    with near, far:
        end = time.monotonic() + TIMEOUT_S
        answering = threading.Thread(target=accept_proven, args=(far, "bench", end))
        answering.start()
        began_s = time.perf_counter()
        connect_proven(near, "bench", end)
        answering.join()
        yield time.perf_counter() - began_s


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--near", choices=("proven", "plain"), help=argparse.SUPPRESS)
    parser.add_argument("--echo", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--core", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.echo:
        echo_main(args.echo[0], args.echo[1], args.core)
        return
    if args.near:
        near_main(args.near, args.samples)
        return
    from antiphon.core.identity import own_identity
    from antiphon.rpc.credentials import server_credentials

    own_identity()  # both ends' children have it then
    runs: dict[str, list[dict[str, list[float]]]] = {"proven": [], "plain": []}
    for number in range(args.repeats):
        for mode in ("proven", "plain") if number % 2 else ("plain", "proven"):
            command = [sys.executable, __file__, "--near", mode, "--samples", str(args.samples)]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            runs[mode].append(json.loads(done.stdout))
    load = round(os.getloadavg()[0], 1)
    for size in map(str, SIZES):
        line: dict[str, Any] = {"bench": "authentication", "transport": "grpc", "bytes": int(size)}
        for at, name in ((0, "trip"), (1, "cpu")):
            pairs = [(proven[size][at], plain[size][at]) for proven, plain in zip(runs["proven"], runs["plain"], strict=True)]
            line[f"{name}_us"], line[f"plain_{name}_us"] = (round(statistics.median(pair[i] for pair in pairs), 1) for i in (0, 1))
            line[f"{name}_ratio"] = round(statistics.median(proven / plain for proven, plain in pairs), 2)
        print(json.dumps({**line, "pairs": args.repeats, "load_1m": load}), flush=True)
    opening = []
    for _ in range(50):
        with proven_pair() as took_s:
            opening.append(took_s * 1e6)
    began_s = time.perf_counter()
    server_credentials(None)
    own_ms = (time.perf_counter() - began_s) * 1e3
    print(json.dumps({"bench": "authentication", "open_us": round(statistics.median(opening), 1), "identity_ms": round(own_ms, 1)}))


if __name__ == "__main__":
    main()
