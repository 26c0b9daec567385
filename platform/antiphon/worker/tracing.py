"""Records a worker's steps for a moment while it serves (control speed; the loop only appends to a ring).

The loop takes a trace up, or lets go of it, between two steps or batches: it never sees it change within one. Must not know: who
asks, or what becomes of the trace.
"""

from __future__ import annotations

import asyncio

from antiphon.telemetry.step_trace import StepTrace, WorkerTrace, clock
from antiphon.worker.ffn_worker import FFNWorker
from antiphon.worker.model_runner import AttentionWorker

MAX_EVENTS = 12_000  # of one answer: about 100 steps of 30 layers, or 1 MB


class StepRecorder:
    """An ``rpc.steps.StepsPort`` over one worker. Belongs to one event loop, another one than the worker's.

    Args:
        worker: whose steps are recorded.
        worker_id: its id.
        role: its role.
    """

    def __init__(self, worker: AttentionWorker | FFNWorker, *, worker_id: str, role: str) -> None:
        self._worker = worker
        self._worker_id = worker_id
        self._role = role
        self._turn = asyncio.Lock()

    async def trace_steps(self, seconds: float) -> WorkerTrace:
        """What the worker does from now on for ``seconds``; a trace that runs since its start goes on."""
        async with self._turn:
            lasting = self._worker.wanted_trace
            trace = StepTrace(MAX_EVENTS) if lasting is None else lasting
            since_s = clock()
            self._worker.wanted_trace = trace
            try:
                await asyncio.sleep(seconds)
            finally:
                self._worker.wanted_trace = lasting
            return trace.taken(worker=self._worker_id, role=self._role, since_s=since_s, max_events=MAX_EVENTS)
