"""Which step is shown of a trace, and that everybody's part of it stands on one time line."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from antiphon.core.errors import InvalidInput, Overloaded
from antiphon.core.ids import Endpoint, Epoch, Role, WorkerId
from antiphon.core.worker_info import WorkerInfo
from antiphon.gateway.web.traced_step import GatewaySteps, LaneEvent, TracedStep, pick
from antiphon.rpc.services import RpcServer
from antiphon.rpc.steps import StepsCalls, StepsServicer
from antiphon.telemetry.step_trace import Event, Mark, StepTrace, WorkerTrace
from antiphon.testing import LocalCluster, wiring, write_tiny_llama
from antiphon.worker.tracing import StepRecorder

PROMPTS = [[5, 6, 7, number] for number in range(6)]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    path = write_tiny_llama(tmp_path_factory.mktemp("model"))
    with LocalCluster(wiring(path, "afd"), path) as made:
        yield made


async def recorded(cluster: LocalCluster) -> list[WorkerTrace]:
    """What both workers record while six sequences are answered."""
    attention = StepRecorder(cluster.generating[0].worker, worker_id="test/attention/0", role="attention")
    ffn = StepRecorder(cluster.ffns[0], worker_id="test/ffn/0", role="ffn")
    asking = [asyncio.create_task(each.trace_steps(0.05)) for each in (attention, ffn)]
    await asyncio.sleep(0)  # both have begun
    for prompt in PROMPTS:
        cluster.submit(prompt, max_tokens=8)
    cluster.run()
    return list(await asyncio.gather(*asking))


def of(lane_events: tuple[LaneEvent, ...], mark: Mark) -> dict[tuple[int, int, int], LaneEvent]:
    return {(e.step, e.layer, e.ubatch): e for e in lane_events if e.mark == mark}


async def test_every_exchange_of_the_step_leaves_is_computed_and_comes_back(cluster: LocalCluster) -> None:
    step = pick(await recorded(cluster))
    assert step is not None
    assert (step.worker, step.rows) == ("test/attention/0", len(PROMPTS))
    near, far = step.lanes
    assert (near.role, far.role) == ("attention", "ffn")
    sent, back, rows = of(near.events, Mark.SEND), of(near.events, Mark.RECEIVE), of(far.events, Mark.ROWS)
    num_layers = cluster.facts.config.num_layers
    assert len(sent) == num_layers * step.num_ubatches
    assert sent.keys() == back.keys() == rows.keys()
    # One process, one clock: what is left of the order is how well clocks are tied.
    for exchange, there in rows.items():
        assert sent[exchange].start_us - far.uncertainty_us <= there.start_us <= there.end_us
        assert there.end_us <= back[exchange].end_us + far.uncertainty_us
    assert all(0 <= e.start_us <= e.end_us <= step.duration_us for lane in step.lanes for e in lane.events)


async def test_recording_leaves_nothing_behind_and_a_lasting_trace_goes_on(cluster: LocalCluster) -> None:
    worker = cluster.generating[0].worker
    await recorded(cluster)
    cluster.generate([1, 2, 3], max_tokens=2)
    assert (worker.wanted_trace, worker.trace) == (None, None)

    lasting = worker.wanted_trace = StepTrace()
    try:
        cluster.generate([1, 2, 3], max_tokens=2)
        before = len(lasting.taken(worker="w", role="attention").events)
        attention, _ = await recorded(cluster)
        assert worker.wanted_trace is lasting
        assert 0 < before < len(lasting.taken(worker="w", role="attention").events)
        assert len(attention.events) == len(lasting.taken(worker="w", role="attention").events) - before
    finally:
        worker.wanted_trace = None


async def test_nothing_computed_is_no_step(cluster: LocalCluster) -> None:
    recorder = StepRecorder(cluster.generating[0].worker, worker_id="test/attention/0", role="attention")
    assert pick([await recorder.trace_steps(0.05)]) is None
    assert pick([]) is None


def test_the_step_with_most_ubatches_is_shown_and_of_those_the_middle_one() -> None:
    events: list[Event] = []
    at_s = 10.0
    for number, (length_s, ubatches) in enumerate([(0.9, 1), (0.1, 2), (0.5, 2), (0.3, 2)]):
        events += [
            Event(mark=Mark.ATTEND, start_s=at_s, end_s=at_s + 0.01, step=number, layer=0, ubatch=u) for u in range(ubatches)
        ]
        events.append(Event(mark=Mark.STEP, start_s=at_s, end_s=at_s + length_s, step=number, rows=3))
        at_s += length_s
    step = pick([WorkerTrace(worker="d/decode/0", role="decode", pid=1, events=tuple(events))])
    assert isinstance(step, TracedStep)
    assert (step.step, step.num_ubatches, step.num_steps) == (3, 2, 4)
    assert step.duration_us == pytest.approx(0.3e6, abs=1)


async def test_a_worker_answers_over_the_wire_what_it_recorded(cluster: LocalCluster) -> None:
    class Canned:
        async def trace_steps(self, seconds: float) -> WorkerTrace:
            return trace

    trace = (await recorded(cluster))[1]
    server = RpcServer([StepsServicer(Canned())], host="127.0.0.1")
    await server.start()
    calls = StepsCalls(server.address)
    try:
        assert await calls.trace_steps(0.05) == trace
        for seconds in (0.0, 60.0):
            with pytest.raises(InvalidInput, match=r"0\.05 to 4"):
                await calls.trace_steps(seconds)
    finally:
        await calls.close()
        await server.close()


async def test_one_trace_at_a_time_and_workers_that_record_none_are_named(tmp_path: Path) -> None:
    server = RpcServer([], host="127.0.0.1")  # of a version without traces
    await server.start()
    record = _record(server.address)
    steps = GatewaySteps(lambda: [record])
    try:
        first = asyncio.create_task(steps.trace("", 0.05))
        await asyncio.sleep(0)
        with pytest.raises(Overloaded):
            await steps.trace("", 0.05)
        traced = await first
        assert (traced.num_workers, traced.silent, traced.step) == (0, ("demo/monolith/0",), None)
        with pytest.raises(InvalidInput, match="there are demo"):
            await steps.trace("other", 0.05)
        with pytest.raises(InvalidInput, match=r"0\.05 to 4"):
            await steps.trace("", 5.0)
    finally:
        await server.close()


def _record(address: str) -> WorkerInfo:
    return WorkerInfo(
        worker_id=WorkerId("demo/monolith/0"),
        deployment="demo",
        pool="monolith",
        role=Role.MONOLITH,
        model="tiny",
        revision="r",
        fingerprint="f",
        epoch=Epoch(1),
        endpoint=Endpoint(rpc=address),
        pid=1,
        host="h",
        ready=True,
    )
