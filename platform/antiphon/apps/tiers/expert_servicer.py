"""One expert's door before a tiered pool: takes requests like an engine, and what its record says (request speed).

Belongs to one event loop; ``deliver`` alone may be called elsewhere. Must not know: which experts are resident, or why.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace

from antiphon.apps.process.wiring.resolve import ModelFacts
from antiphon.apps.tiers.model_pool import ModelPool
from antiphon.apps.tiers.plan import TierMember
from antiphon.coe.serving.expert_health import LOAD_GAUGE, RESIDENT_GAUGE
from antiphon.coe.tiers.policy import LoadTimes
from antiphon.coe.tiers.pool import TieredPool
from antiphon.coe.tiers.standing import TierStanding
from antiphon.core.errors import AntiphonError, ErrorInfo
from antiphon.core.ids import Endpoint, Epoch, Role, WorkerId
from antiphon.core.request import FinishReason, Request, RequestId, RequestOutput
from antiphon.core.worker_info import WorkerInfo
from antiphon.rpc.engine.server import EngineServicer

_WAIT_S = 3600.0  # gateways have deadlines of their own, and abort


class ExpertServicer:
    """An ``rpc.engine.server.EnginePort`` for one expert of a pool.

    Args:
        expert: its name in the pool.
        model_pool: where it answers.
        num_blocks: KV blocks it has while it is resident.
        info: its record; ``ready`` and ``load`` are the registrar's.
    """

    def __init__(self, *, expert: str, model_pool: ModelPool, num_blocks: int, info: WorkerInfo) -> None:
        self._expert = expert
        self._model_pool = model_pool
        self._pool: TieredPool[Request, None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._servicer: EngineServicer | None = None
        self._tasks: dict[RequestId, asyncio.Task[None]] = {}
        self._address = ""
        self.num_blocks = num_blocks
        self.info = info

    @staticmethod
    def record(member: TierMember, facts: ModelFacts, *, worker_id: WorkerId, epoch: Epoch, pid: int, host: str) -> WorkerInfo:
        """What does not change while it serves."""
        scheduler = member.document.spec.scheduler
        return WorkerInfo(
            worker_id=worker_id,
            deployment=member.deployment,
            pool=member.pool,
            role=Role.MONOLITH,
            model=member.document.model_name,
            revision=facts.revision,
            fingerprint=facts.fingerprint,
            epoch=epoch,
            endpoint=Endpoint(rpc=""),
            pid=pid,
            host=host,
            max_model_len=facts.max_model_len,
            vocab_size=facts.config.vocab_size,
            block_size_tokens=facts.kv.block_size_tokens,
            max_num_seqs=scheduler.max_num_seqs,
            max_queued_requests=scheduler.max_queued_requests,
            num_experts=facts.config.num_experts,
        )

    @property
    def address(self) -> str:
        """Where its engine service listens."""
        return self._address

    @address.setter
    def address(self, address: str) -> None:
        self._address = address
        self.info = replace(self.info, endpoint=Endpoint(rpc=address))

    @property
    def num_requests(self) -> int:
        """Requests that have not ended."""
        return len(self._tasks)

    def open(self, pool: TieredPool[Request, None], loop: asyncio.AbstractEventLoop) -> EngineServicer:
        """The service to register with a server."""
        self._pool, self._loop = pool, loop
        self._servicer = EngineServicer(self, loop=loop)
        return self._servicer

    # ---- EnginePort --------------------------------------------------------------------------------------------

    def submit(self, request: Request) -> None:
        """See ``EnginePort``; refusals come back as outputs."""
        assert self._loop is not None
        task = self._loop.create_task(self._answer(request), name=f"tier-{request.request_id}")
        self._tasks[request.request_id] = task
        task.add_done_callback(lambda _task: self._tasks.pop(request.request_id, None))

    def abort(self, request_id: RequestId) -> None:
        """See ``EnginePort``."""
        task = self._tasks.get(request_id)
        if task is not None:
            task.cancel()
        self._model_pool.abort(self._expert, request_id)

    def deliver(self, outputs: Sequence[RequestOutput]) -> None:
        """What a step made, from any thread."""
        if self._servicer is not None:
            self._servicer.deliver(outputs)

    async def _answer(self, request: Request) -> None:
        assert self._pool is not None
        self._pool.expect({self._expert: 1.0})
        try:
            await self._pool.submit(self._expert, request, _WAIT_S)
        except AntiphonError as error:
            why = ErrorInfo.of(error)
            self.deliver([RequestOutput(request_id=request.request_id, finish_reason=FinishReason.ERROR, error=why)])

    # ---- what others see ---------------------------------------------------------------------------------------

    def gauges(self, standing: TierStanding, times: LoadTimes | None, num_loads: int) -> dict[str, float]:
        """For its record: where it is, how long it would take to be here, and the stages of its last load."""
        found = {RESIDENT_GAUGE: float(standing.is_resident), LOAD_GAUGE: standing.load_s, "num_loads": float(num_loads)}
        if times is not None:
            found |= {
                "load_evict_s": times.evict_s,
                "load_read_s": times.read_s,
                "load_convert_s": times.convert_s,
                "load_ready_s": times.ready_s,
            }
        return found
