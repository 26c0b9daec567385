"""The same tokens over every transport: two attention workers on three FFN slices, joined by real links, against transformers."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from antiphon.apps.process.wiring.build import AttentionPart, build_attention, build_ffn
from antiphon.apps.process.wiring.resolve import resolve_model
from antiphon.apps.process.wiring.sizes import afd_layout, num_ubatches
from antiphon.core.errors import Unavailable
from antiphon.core.ids import Epoch, FFNShard, Role, WorkerId
from antiphon.core.request import Request, RequestId, RequestOutput, SamplingParams
from antiphon.testing import LocalCluster, wiring
from antiphon.transport.base import Answer, Hello
from antiphon.transport.connect.choose import open_transport
from antiphon.worker.ffn_worker import FFNWorker

VOCAB = 151
NUM_ATTENTION, NUM_FFN = 2, 3
DEADLINE_S = 60.0


def greedy(model: Any, prompt: list[int]) -> list[int]:
    ids = torch.tensor([prompt])
    # Without a mask of ours, transformers takes every 0 in a prompt for padding.
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    return [int(token) for token in out[0, len(prompt) :]]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[list[int]], list[list[int]]]:
    """A checkpoint, prompts, and what transformers makes of them."""
    torch.manual_seed(6)
    config = LlamaConfig(
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCAB,
        max_position_embeddings=256,
        initializer_range=0.2,  # logits far apart: no ties to break
    )
    model: Any = LlamaForCausalLM(config)
    model.eval()
    path = tmp_path_factory.mktemp("tiny")
    model.save_pretrained(path)
    chance = random.Random(5)
    prompts = [[chance.randrange(VOCAB) for _ in range(n)] for n in (1, 7, 30, 70)]
    with torch.inference_mode():
        expected = [greedy(model, prompt) for prompt in prompts]
    return path, prompts, expected


class Deployment:
    """Engines and FFN workers, each in a thread of its own, joined by links of one transport."""

    def __init__(self, path: Path, transport: str, undo: ExitStack, **section: Any) -> None:
        spec = wiring(
            path,
            "afd",
            attention=NUM_ATTENTION,
            ffn=NUM_FFN,
            cache={"numBlocks": 64},
            transport={"numUbatches": 2, **section},
            scheduler={"maxNumBatchedTokens": 32},
        )
        facts = resolve_model(spec, str(path), "test")
        shards = [FFNShard.of(index, num_tensor=NUM_FFN, num_expert=1) for index in range(NUM_FFN)]
        self.ffns = [build_ffn(facts, shard, Epoch(1)) for shard in shards]
        self.tokens: dict[str, list[int]] = {}
        self.failed: list[BaseException] = []
        self._num_ended = 0
        self.parts: list[AttentionPart] = []
        # One object for both ends: loopback finds its listeners by name within it.
        kind = open_transport(transport)
        listeners = []
        for shard, worker in zip(shards, self.ffns, strict=True):
            layout = afd_layout(facts, spec, shard, attention_end=False, ubatches=2)
            host = f"ffn-{shard.index}" if transport == "loopback" else "127.0.0.1"
            listener = kind.listen(
                host, _always(Hello(worker_id=WorkerId(f"test/ffn/{shard.index}"), epoch=Epoch(1), layout=layout))
            )
            worker.side.add_listener(listener)
            listeners.append(listener)
        self._stop = threading.Event()
        threads = [threading.Thread(target=self._guarded, args=(worker.serve, self._stop.is_set)) for worker in self.ffns]
        for thread in threads:
            thread.start()
        undo.callback(self._close, threads)
        for index in range(NUM_ATTENTION):
            me = WorkerId(f"test/attention/{index}")
            part = build_attention(facts, spec, Role.ATTENTION, me, Epoch(1), self._take, time.monotonic, index=index)
            self.parts.append(part)
            for shard, listener in zip(shards, listeners, strict=True):
                layout = afd_layout(facts, spec, shard, attention_end=True, ubatches=num_ubatches(spec, Role.ATTENTION))
                link = kind.connect(listener.address, Hello(worker_id=me, epoch=Epoch(1), layout=layout), 30.0)
                part.worker.afd.add_link(shard.index, link)

    def generate(self, prompts: Sequence[Sequence[int]], num_tokens: int) -> list[list[int]]:
        for number, prompt in enumerate(prompts):
            name = RequestId(f"r{number}")
            self.tokens[name] = []
            params = SamplingParams(max_tokens=num_tokens, temperature=0.0, ignore_eos=True)
            request = Request(request_id=name, prompt_token_ids=tuple(prompt), sampling=params, arrival_s=time.monotonic())
            self.parts[number % NUM_ATTENTION].engine.submit(request)
        threads = [threading.Thread(target=self._guarded, args=(self._run, part)) for part in self.parts]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(DEADLINE_S)
        assert not self.failed
        return list(self.tokens.values())

    def _run(self, part: AttentionPart) -> None:
        deadline = time.monotonic() + DEADLINE_S
        while part.engine.step() or part.engine.scheduler.has_requests:
            assert time.monotonic() < deadline

    def _guarded(self, loop: Callable[..., None], *args: Any) -> None:
        try:
            loop(*args)
        except BaseException as error:  # noqa: BLE001  # raised by the test
            self.failed.append(error)

    def _take(self, outputs: Sequence[RequestOutput]) -> None:
        for output in outputs:
            assert output.error is None, output.error
            self.tokens[output.request_id] += output.new_token_ids

    def _close(self, threads: Sequence[threading.Thread]) -> None:
        self._stop.set()
        for thread in threads:
            thread.join(DEADLINE_S)
        for part in self.parts:
            part.close()
        for worker in self.ffns:
            worker.side.close()


def _always(hello: Hello) -> Answer:
    return lambda _theirs: hello


@contextmanager
def deployment(path: Path, transport: str, **section: Any) -> Iterator[Deployment]:
    with ExitStack() as undo:
        try:
            running = Deployment(path, transport, undo, **section)
        except Unavailable as error:
            pytest.skip(f"{transport} does not work here: {error}")
        yield running


def rested(workers: Sequence[FFNWorker], num_slots: int) -> bool:
    """True once every FFN worker has all slots of every ring back; asked until a deadline, as they rest on their own threads."""
    deadline = time.monotonic() + 10.0
    while time.monotonic() < deadline:
        if all(worker.side.num_free_slots == num_slots for worker in workers):
            return True
        time.sleep(0.01)
    return False


@pytest.mark.parametrize("transport", ["loopback", "shm", "grpc", "nixl"])
def test_two_attention_and_three_ffn_workers_make_the_tokens_of_transformers(
    tiny: tuple[Path, list[list[int]], list[list[int]]], transport: str
) -> None:
    path, prompts, expected = tiny
    with deployment(path, transport) as running:
        assert running.generate(prompts, 12) == expected
        assert all(part.worker.afd.num_free_slots == 3 for part in running.parts), "two ubatches and one"
        assert rested(running.ffns, 3)


def test_int8_rows_give_nearly_the_logprobs_of_full_precision(tiny: tuple[Path, list[list[int]], list[list[int]]]) -> None:
    path, prompts, _ = tiny
    seen = []
    for activations in ("auto", "int8"):
        spec = wiring(path, "afd", ffn=2, cache={"numBlocks": 64}, transport={"activationDtype": activations})
        with LocalCluster(spec, path) as cluster:
            request_id = cluster.submit(prompts[-1], max_tokens=1, num_logprobs=5)
            cluster.run()
            seen.append(cluster.outputs[request_id].logprobs[0].top)
    full, coded = dict(seen[0]), dict(seen[1])
    common = full.keys() & coded.keys()
    assert len(common) >= 3
    assert all(abs(full[token] - coded[token]) < 0.05 for token in common)
    assert full != coded, "the rows did travel in int8"
