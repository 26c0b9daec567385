"""An attention worker and FFN workers in processes of their own, with rows in a card's memory between them; one of them is killed.

Runs with ``ANTIPHON_PRETEND_CARD=1``, where the host's memory stands in for a card's; ``make test`` runs this file in a process of
its own.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import Any

import pytest

from antiphon.apps.process.wiring.build import AttentionPart, build_attention, build_ffn
from antiphon.apps.process.wiring.resolve import resolve_model
from antiphon.apps.process.wiring.sizes import afd_layout, num_ubatches
from antiphon.core.document.spec import LLMDeploymentSpec
from antiphon.core.ids import Epoch, FFNShard, Role, WorkerId
from antiphon.core.request import Request, RequestId, RequestOutput, SamplingParams
from antiphon.device.device import CPU, PRETENDS
from antiphon.testing import LocalCluster, wiring, write_tiny_llama, write_tiny_moe
from antiphon.transport.base import Hello
from antiphon.transport.connect.choose import connect_auto, listen_all
from antiphon.transport.shm.card_slots import FlagOrdered
from antiphon.transport.shm.ring import RingLink

assert PRETENDS, "this file runs with ANTIPHON_PRETEND_CARD=1"
FORK = get_context("fork")  # whose children need not import anything
DEADLINE_S = 120.0
PROMPTS = [[5, 6, 7], list(range(30)), [9] * 11]
WRITERS: dict[str, Callable[[Path], object]] = {"dense": write_tiny_llama, "moe": write_tiny_moe}


def serve(spec: LLMDeploymentSpec, checkpoint: str, epoch: int, pipe: Connection, silent_after: int) -> None:
    """An FFN worker: says its address and serves until it is killed. It tells of answers beyond ``silent_after`` as its host
    would, but its card never has them there; it says so.
    """
    real, num_written = FlagOrdered.written, 0

    def written(card: FlagOrdered, slot: int) -> None:
        nonlocal num_written
        num_written += 1
        if num_written <= silent_after:
            real(card, slot)
        elif num_written == silent_after + 1:
            pipe.send("silent")

    FlagOrdered.written = written  # type: ignore[method-assign, assignment]
    facts = resolve_model(spec, checkpoint, "test", CPU)
    worker = build_ffn(facts, FFNShard(), Epoch(epoch))
    layout = afd_layout(facts, spec, FFNShard(), attention_end=False, ubatches=num_ubatches(spec, Role.ATTENTION))
    me = Hello(worker_id=WorkerId(f"test/ffn/{epoch}"), epoch=Epoch(epoch), layout=layout)
    listener = listen_all(("shm",), "127.0.0.1", lambda _: me)
    worker.side.add_listener(listener)
    pipe.send(listener.address)
    worker.serve(lambda: False)


class Split:
    """An attention worker here, FFN workers in processes."""

    def __init__(self, kind: str, folder: Path) -> None:
        WRITERS[kind](folder)
        sections: dict[str, Any] = {"cache": {"numBlocks": 64}, "transport": {"numUbatches": 2}, "scheduler": {"maxNumSeqs": 4}}
        self.spec = wiring(folder, "afd", ffn_replicas=2, **sections)
        self.folder = folder
        self.facts = resolve_model(self.spec, str(folder), "test", CPU)
        self.tokens: dict[RequestId, list[int]] = {}
        self.num_ended = 0
        self.processes: list[ForkProcess] = []
        self.pipes: list[Connection] = []
        self.links: list[RingLink] = []
        self.part: AttentionPart = build_attention(
            self.facts, self.spec, Role.ATTENTION, WorkerId("test/attention/0"), Epoch(1), self._take, time.monotonic
        )

    def start(self, *epochs: int, silent_after: int = 1 << 30) -> None:
        """FFN workers of these epochs, linked; the first falls silent."""
        for epoch in epochs:
            ours, theirs = FORK.Pipe()
            limit = silent_after if epoch == epochs[0] else 1 << 30
            process = FORK.Process(target=serve, args=(self.spec, str(self.folder), epoch, theirs, limit), daemon=True)
            process.start()
            self.processes.append(process)
            self.pipes.append(ours)
            assert ours.poll(DEADLINE_S)
            address = ours.recv()
            layout = afd_layout(
                self.facts, self.spec, FFNShard(), attention_end=True, ubatches=num_ubatches(self.spec, Role.ATTENTION)
            )
            me = Hello(worker_id=WorkerId("test/attention/0"), epoch=Epoch(1), layout=layout)
            link = connect_auto([address], me, DEADLINE_S)
            assert isinstance(link, RingLink)
            assert isinstance(link.card, FlagOrdered), "rows do not lie in the card's memory"
            self.links.append(link)
            self.part.worker.afd.add_link(0, link)

    def generate(self, num_tokens: int, each_step: Callable[[int], None] = lambda _: None) -> list[list[int]]:
        first = len(self.tokens)
        for n, prompt in enumerate(PROMPTS):
            name = RequestId(f"r{first + n}")
            self.tokens[name] = []
            params = SamplingParams(max_tokens=num_tokens, temperature=0.0, ignore_eos=True)
            self.part.engine.submit(
                Request(request_id=name, prompt_token_ids=tuple(prompt), sampling=params, arrival_s=time.monotonic())
            )
        deadline, step = time.monotonic() + DEADLINE_S, 0
        while self.num_ended < len(self.tokens):
            assert time.monotonic() < deadline
            each_step(step)
            self.part.engine.step()
            step += 1
        return list(self.tokens.values())[first:]

    def close(self) -> None:
        self.part.close()
        for process in self.processes:
            process.kill()
            process.join()

    def _take(self, outputs: Sequence[RequestOutput]) -> None:
        for output in outputs:
            assert output.error is None, output.error
            self.tokens[output.request_id] += output.new_token_ids
            self.num_ended += output.finish_reason is not None


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[[str], Split]]:
    made: list[Split] = []

    def start(kind: str) -> Split:
        made.append(Split(kind, tmp_path))
        return made[-1]

    yield start
    for split in made:
        split.close()


def expected_of(split: Split) -> list[list[int]]:
    with LocalCluster(wiring(split.folder, "monolith", cache={"numBlocks": 64}), split.folder) as cluster:
        return [cluster.generate(prompt, max_tokens=12, ignore_eos=True) for prompt in PROMPTS]


def test_an_ffn_process_killed_at_work_costs_no_token(make: Callable[[str], Split]) -> None:
    split = make("moe")
    split.start(1, 2)
    expected = expected_of(split)
    side = split.part.worker.afd

    def kill(step: int) -> None:
        if step == 4:  # it answers nothing from now on, so that it is waited for when it dies
            os.kill(split.processes[0].pid or 0, signal.SIGSTOP)
            threading.Timer(0.3, split.processes[0].kill).start()

    assert split.generate(12, kill) == expected
    assert len(side.losses) == 1
    assert side.times.num_resent > 0
    assert split.part.engine.scheduler.blocks.num_free_blocks == split.facts.num_blocks
    graphs = split.part.worker._layers.graphs
    assert graphs is not None
    assert graphs.num_replays > 20


def test_one_of_a_new_epoch_takes_the_place_of_the_last_one_killed(make: Callable[[str], Split]) -> None:
    split = make("moe")
    split.start(1)
    expected = expected_of(split)
    assert split.generate(12) == expected
    split.start(2)
    split.processes[0].kill()
    assert split.generate(12) == expected
    assert split.part.engine.scheduler.blocks.num_free_blocks == split.facts.num_blocks


@pytest.mark.parametrize("silent_after", [0, 3, 22])
def test_a_card_that_waits_for_a_killed_process_goes_on_and_the_step_is_computed_again(
    silent_after: int, make: Callable[[str], Split]
) -> None:
    split = make("dense")
    split.start(1, 2, silent_after=silent_after)
    expected = expected_of(split)

    def kill() -> None:
        if split.pipes[0].poll(DEADLINE_S):  # told of an answer that is not there: it is being waited for
            split.processes[0].kill()

    killer = threading.Thread(target=kill)
    killer.start()
    assert split.generate(12) == expected
    killer.join()
    side = split.part.worker.afd
    assert side.ahead.num_repeats == 1
    assert len(side.losses) == 1
