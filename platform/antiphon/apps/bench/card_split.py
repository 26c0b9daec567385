"""1A1F on this machine's card, as shares of its own roofline, and with an FFN process killed (control speed).

    inline        both ends in this process, slots on the card, one stream: what recordings and the exchange itself cost
    processes     the FFN end in a process of its own, slots in memory of the card that both map; the card takes turns between them,
                  so that its time says what the protocol does, and little of its speed
    kill          the same with two FFN processes, one of which is killed while it owes an answer: no row may change

Run as a module it is the FFN process: it prints its address and serves until it is killed.
"""

from __future__ import annotations

import json
import logging
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from typing import Any

import torch

from antiphon.apps.bench.card import BLOCK, Bench, RandomCheckpoint, Shape
from antiphon.connectors.afd.attention_side import AttentionSide
from antiphon.connectors.afd.ffn_side import FFNSide
from antiphon.core.errors import Unavailable
from antiphon.core.identity import own_identity
from antiphon.core.ids import Epoch, FFNShard, WorkerId
from antiphon.device.device import CPU, open_device
from antiphon.device.graphs import CudaGraphs, TapeGraphs
from antiphon.device.shared import kind_of
from antiphon.models.attention.kv_cache import KVCache
from antiphon.models.cache_layout import kv_layout
from antiphon.models.decoder import AttentionHalves, FFNHalves
from antiphon.models.families import describe
from antiphon.transport.base import Hello, Link, LinkLayout
from antiphon.transport.connect.choose import connect_auto, listen_all
from antiphon.transport.loopback import loopback_pair
from antiphon.worker.batch_builder import BatchBuilder, Run
from antiphon.worker.cards.ffn_graphs import FFNGraphs
from antiphon.worker.cards.split_graphs import SplitGraphs
from antiphon.worker.ffn_worker import FFNWorker
from antiphon.worker.layer_loop import LayerLoop, LayerTimes

_DTYPE = torch.bfloat16
_START_S, _ANSWER_S = 120.0, 60.0  # an FFN process makes its weights and compiles its kernels first
_STOPPED_S = 0.3  # between stopping an FFN process and killing it


def hello(shape: Shape, name: str, memory: str, num_ubatches: int, max_rows: int) -> Hello:
    """What either end says; rows are as wide both ways, and lie in ``memory`` where that can be shared."""
    num_bytes = max_rows * shape.hidden * _DTYPE.itemsize
    layout = LinkLayout(
        channel="afd",
        num_slots=num_ubatches + 1,
        send_slot_bytes=num_bytes,
        recv_slot_bytes=num_bytes,
        fields=(("shape", shape.name),),
        memory=memory,
    )
    return Hello(worker_id=WorkerId(name), epoch=Epoch(1), layout=layout)


def ffn_worker(shape: Shape, device: torch.device) -> FFNWorker:
    """One with every layer's half, recorded."""
    checkpoint: Any = RandomCheckpoint(shape, device)
    config = describe(shape.config)
    side = FFNSide(
        epoch=Epoch(1),
        hidden_size=shape.hidden,
        dtype=_DTYPE,
        return_dtype=_DTYPE,
        compute_dtype=_DTYPE,
        experts_per_row=[0] * shape.layers,
    )
    halves = FFNHalves(config, checkpoint, _DTYPE, device, FFNShard())
    graphs = FFNGraphs(
        halves, TapeGraphs() if device.type == "cpu" else CudaGraphs(device), device, experts_per_row=[0] * shape.layers
    )
    graphs.record()
    return FFNWorker(halves, side, graphs=graphs)


class AttentionEnd:
    """The attention halves of a batch of decodes, recorded, with an exchange to whoever is linked."""

    def __init__(self, bench: Bench, shape: Shape, batch: int, context: int, num_ubatches: int) -> None:
        self.shape, self.num_ubatches, device = shape, num_ubatches, bench.device
        self.num_bytes = _DTYPE.itemsize * (
            num_ubatches * (shape.num_weights - shape.vocab * shape.hidden) + batch * context * shape.kv_numbers
        )
        checkpoint: Any = RandomCheckpoint(shape, device)
        blocks = -(-context // BLOCK)
        halves = AttentionHalves(describe(shape.config), checkpoint, _DTYPE, device, context + BLOCK)
        cache = KVCache(kv_layout(halves.config, _DTYPE, BLOCK), batch * blocks + 1, device)
        graphs = SplitGraphs(
            halves,
            cache,
            bench.graphs(),
            max_rows=batch,
            num_lanes=num_ubatches,
            spare_block=batch * blocks,
            return_dtype=_DTYPE,
        )
        graphs.record()
        self.side = AttentionSide(
            epoch=Epoch(1),
            num_shards=1,
            num_ubatches=num_ubatches,
            hidden_size=shape.hidden,
            dtype=_DTYPE,
            return_dtype=_DTYPE,
            answer_timeout_s=_ANSWER_S,
            hold_s=_ANSWER_S,
        )
        self._loop = LayerLoop(halves, cache, self.side, num_ubatches=num_ubatches, warms=False, times=LayerTimes(), graphs=graphs)
        builder = BatchBuilder(cache, device, context + BLOCK, with_slots=False)
        runs = [
            Run(token_ids=range(context), block_ids=range(i * blocks, (i + 1) * blocks), first_token=context - 1, num_tokens=1)
            for i in range(batch)
        ]
        each = -(-batch // num_ubatches)
        self._built = [builder.build(runs[at : at + each]) for at in range(0, batch, each)]
        self._step = 0

    def step(self) -> list[torch.Tensor]:
        """Every layer of one step; the ubatches' rows behind the last."""
        self._step += 1
        with torch.inference_mode():
            states = [self._loop.begin(number, *built) for number, built in enumerate(self._built)]
            self._loop.run(self._step, states, None)
            self.side.rest()
        return [state.x_TD for state in states]


def inline(bench: Bench, shape: Shape, batch: int, context: int, num_ubatches: int) -> str:
    """Both ends here, slots on the card."""
    end, worker = AttentionEnd(bench, shape, batch, context, num_ubatches), ffn_worker(shape, bench.device)
    near, far = loopback_pair(
        hello(shape, "attention", "", num_ubatches, batch),
        hello(shape, "ffn", "", num_ubatches, batch),
        bench.device,
    )

    def pump() -> None:
        worker.pump()

    near.on_poll = pump
    end.side.add_link(0, near)
    worker.side.add_link(far)
    return _measured(bench, end, f"1A1F inline {shape.name}, batch {batch}, {num_ubatches} ubatches", bench.time_s(end.step))


def processes(bench: Bench, shape: Shape, batch: int, context: int, num_ubatches: int, *, with_flags: bool) -> str:
    """The FFN end in a process of its own. ``with_flags``: cards keep the order, where this one can; else the host does."""
    memory = kind_of(bench.device) if with_flags else kind_of(bench.device).removesuffix("-flags")
    end = AttentionEnd(bench, shape, batch, context, num_ubatches)
    with ffn_processes(bench, shape, end, 1, batch, memory):
        end.step()
        start_s = time.perf_counter()
        for _ in range(bench.repeats):
            end.step()
        _settle(bench)
        step_s = (time.perf_counter() - start_s) / bench.repeats
        exchange_s = end.side.times.round_trip_s / end.side.times.num_exchanges
    name = f"1A1F processes {shape.name}, batch {batch}, {num_ubatches} ubatches, {memory}"
    text = _measured(bench, end, name, step_s)
    bench.found[name]["exchange_s"] = exchange_s
    return f"{text}, an exchange {exchange_s * 1e6:.0f} us"


def kill(bench: Bench, shape: Shape, batch: int, context: int) -> str:
    """Two FFN processes, one of which is killed while it owes an answer. Raises RuntimeError: a row changed."""
    end = AttentionEnd(bench, shape, batch, context, 2)
    with ffn_processes(bench, shape, end, 2, batch, kind_of(bench.device)) as started:
        expected = [x_TD.clone() for x_TD in end.step()]
        used = started[0]
        used.send_signal(signal.SIGSTOP)  # it answers nothing from now on: whatever waits, waits for it
        threading.Timer(_STOPPED_S, used.kill).start()
        start_s = time.perf_counter()
        found = end.step()
        _settle(bench)
        pause_s = time.perf_counter() - start_s - _STOPPED_S
        if not all(torch.equal(one, other) for one, other in zip(found, expected, strict=True)):
            raise RuntimeError("rows differ after an FFN process was killed")
    resent, repeats = end.side.times.num_resent, end.side.ahead.num_repeats
    bench.found[f"1A1F kill {shape.name}"] = {"pause_s": pause_s, "resent": resent, "repeats": repeats}
    return f"no row changed, {resent} exchanges sent again, {repeats} steps computed again, {pause_s * 1e3:.0f} ms for the step"


@contextmanager
def ffn_processes(
    bench: Bench, shape: Shape, end: AttentionEnd, count: int, max_rows: int, memory: str
) -> Iterator[list[subprocess.Popen[str]]]:
    """FFN processes linked to ``end``, which uses the first while it lives; killed at the end."""
    facts = {"shape": asdict(shape), "num_ubatches": end.num_ubatches, "max_rows": max_rows, "memory": memory}
    names = [f"ffn-{number}" for number in range(count)]
    command = [sys.executable, "-m", "antiphon.apps.bench.card_split", "cpu" if bench.device.type == "cpu" else "cuda"]
    if bench.device.type != "cpu":
        torch.cuda.empty_cache()  # what earlier sections left is theirs to take
    own_identity()  # what they start with, so that they are believed
    started = [
        subprocess.Popen([*command, json.dumps({**facts, "name": name})], stdout=subprocess.PIPE, text=True) for name in names
    ]
    try:
        for process in started:
            assert process.stdout is not None
            address = process.stdout.readline().strip()
            end.side.add_link(0, _linked(address, hello(shape, "attention", memory, end.num_ubatches, max_rows)))
        yield started
    finally:
        end.side.close()
        for process in started:
            process.kill()
            process.wait()


def _linked(address: str, mine: Hello) -> Link:
    """A link to an FFN process that may be busy with its start. Raises Unavailable: it stays so."""
    until_s = time.monotonic() + _START_S
    while True:
        try:
            return connect_auto([address], mine, _START_S)
        except Unavailable:
            if time.monotonic() > until_s:
                raise


def _measured(bench: Bench, end: AttentionEnd, name: str, step_s: float) -> str:
    share = end.num_bytes / step_s / bench.copy_bytes_per_s
    bench.found[name] = {"step_s": step_s, "share_of_copy": share}
    return f"{step_s * 1e3:.2f} ms a step, {share:.2f} of copy with weights read {end.num_ubatches} times"


def _settle(bench: Bench) -> None:
    if bench.device.type == "cuda":
        torch.cuda.synchronize(bench.device)


def sections(bench: Bench, shape: Shape) -> list[tuple[str, Callable[[], str]]]:
    """What ``make gpu`` runs of this."""
    parts: Sequence[tuple[str, Callable[[], str]]] = [
        (f"1A1F inline, {num_ubatches} ubatches", partial(inline, bench, shape, 64, 1024, num_ubatches)) for num_ubatches in (1, 2)
    ]
    return [
        *parts,
        ("1A1F in two processes, hosts keep the order", partial(processes, bench, shape, 64, 1024, 2, with_flags=False)),
        ("1A1F in two processes, cards keep the order", partial(processes, bench, shape, 64, 1024, 2, with_flags=True)),
        ("kill of an FFN process", partial(kill, bench, shape, 64, 1024)),
    ]


def serve(device_name: str, facts: str) -> None:
    """The FFN process: never returns."""
    given = json.loads(facts)
    shape = Shape(**given["shape"])
    device = CPU.torch if device_name == "cpu" else open_device("cuda", 0.4, "make gpu").torch
    worker = ffn_worker(shape, device)
    mine = hello(shape, given["name"], given["memory"], given["num_ubatches"], given["max_rows"])
    listener = listen_all(("shm",), "127.0.0.1", lambda _: mine)
    worker.side.add_listener(listener)
    print(listener.address, flush=True)  # noqa: T201
    worker.serve(lambda: False)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, stream=sys.stderr)
    serve(*sys.argv[1:])
