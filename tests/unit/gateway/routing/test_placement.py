"""What the gateway makes of loads that workers told a while ago."""

from __future__ import annotations

import pytest

from antiphon.core.directory import WorkerRecord
from antiphon.core.errors import Overloaded
from antiphon.core.ids import Endpoint, Epoch, Role, WorkerId
from antiphon.core.worker_info import WorkerInfo, WorkerLoad
from antiphon.directory.workers import WorkerView
from antiphon.gateway.routing.placement import Placement


def record(model: str = "m", *, age_s: float = 0.1, load: WorkerLoad = WorkerLoad(), **changes: object) -> WorkerRecord:
    values: dict[str, object] = {
        "worker_id": WorkerId(f"{model}/0"),
        "deployment": "d",
        "pool": "p",
        "role": Role.MONOLITH,
        "model": model,
        "revision": "r",
        "fingerprint": "f",
        "epoch": Epoch(1),
        "endpoint": Endpoint(rpc="h:1"),
        "pid": 1,
        "host": "h",
        "ready": True,
        "max_num_seqs": 4,
        "max_queued_requests": 8,
        "load": load,
    }
    return WorkerRecord(info=WorkerInfo(**{**values, **changes}), age_s=age_s, lease_s=5.0)  # type: ignore[arg-type]


class Source:
    records: tuple[WorkerRecord, ...] = ()

    async def workers(self) -> tuple[WorkerRecord, ...]:
        return self.records


class Client:
    """Sessions, the first worker's with so many requests on it."""

    def __init__(self) -> None:
        self.num_inflight, self.has_less_than_others = 0, False

    def inflight_on(self, worker: WorkerId) -> int:
        return self.num_inflight if worker == "m/0" else 0

    def is_connected(self, _worker: WorkerId) -> bool:
        return True

    def has_less(self, _worker: WorkerId, _tenant: str) -> bool:
        return self.has_less_than_others


FULL = WorkerLoad(num_running=4, num_waiting=8)


async def made(*records: WorkerRecord) -> tuple[Placement, Source, WorkerView, Client]:
    source, client = Source(), Client()
    view = WorkerView(source)
    placement = Placement(view, client, remote_prefill_min_tokens=64)  # type: ignore[arg-type]
    source.records = records
    client.num_inflight = 12
    await view.refresh()
    return placement, source, view, client


async def test_a_load_that_is_seen_again_is_as_old_as_it_is() -> None:
    placement, source, view, client = await made(record(load=FULL))
    with pytest.raises(Overloaded):
        placement.place("m", [1, 2, 3])
    client.num_inflight = 0  # the flood is over; its worker has not said so yet
    source.records = (record(load=FULL, age_s=0.6),)
    await view.refresh()
    assert placement.place("m", [1, 2, 3]).worker == "m/0"
    source.records = (record(load=FULL, age_s=0.1),)  # told anew: these are others' requests
    await view.refresh()
    with pytest.raises(Overloaded):
        placement.place("m", [1, 2, 3])


async def test_nothing_is_refused_early_that_some_worker_might_take() -> None:
    placement, source, view, client = await made(record(load=FULL))
    with pytest.raises(Overloaded) as refused:
        placement.check_room({"m"}, "t")
    assert refused.value.retry_after_s >= 1.0
    placement.check_room({"m", "asleep"}, "t")  # that one has no worker yet: it is woken by who asks
    client.has_less_than_others = True
    placement.check_room({"m"}, "t")
    client.has_less_than_others = False
    for other in (record("n"), record("n", ready=False), record("n", draining=True)):
        source.records = (record(load=FULL), other)
        await view.refresh()
        placement.check_room({"m", "n"}, "t")
    source.records = (record(load=FULL), record("embeds"))
    await view.refresh()
    with pytest.raises(Overloaded):
        placement.check_room({"m"}, "t")
    source.records = ()
    await view.refresh()
    placement.check_room({"m"}, "t")  # the lack of workers has an error of its own
