"""The loop of an engine process: step while there is work, else sleep until something comes (step speed).

Around it, on other threads: the rpc server (requests in, outputs out), the lease, the peer keeper. Must not know: Ray.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Sequence
from typing import Protocol

from antiphon.apps.process.wiring.build import AttentionPart
from antiphon.core.errors import Unavailable
from antiphon.core.request import Request, RequestOutput
from antiphon.core.worker_info import WorkerLoad
from antiphon.rpc.engine.server import EnginePort, EngineServicer
from antiphon.rpc.experts import ExpertsPort, ExpertsServicer
from antiphon.rpc.services import RpcServer, Service
from antiphon.rpc.steps import StepsPort, StepsServicer
from antiphon.telemetry import Telemetry
from antiphon.telemetry.stages import StageWindow, attention_figures
from antiphon.transport.wakeup import Wakeup

IDLE_WAIT_S = 0.5
START_TIMEOUT_S = 20.0


class SteppedEngine(EnginePort, Protocol):
    """An engine that a loop steps."""

    wake: Callable[[], None]

    @property
    def has_inbox(self) -> bool:
        """True when something was submitted or aborted since the last step."""
        ...


class InboxWakeup:
    """Lets a loop that sleeps on links be woken by the engine's inbox; a ``transport.base.Waitable``."""

    spin_s = 0.0
    spin_address = 0

    def __init__(self, engine: SteppedEngine) -> None:
        self._engine = engine
        self._wakeup = Wakeup()
        engine.wake = self._wakeup.ring

    def pending(self) -> bool:
        """True when the inbox has something."""
        return self._engine.has_inbox

    def park(self) -> Sequence[int]:
        """The wakeup's descriptor."""
        return (self._wakeup.fd,)

    def unpark(self, *, woken: bool) -> None:
        """Silence the wakeup."""
        if woken:
            self._wakeup.clear()

    def ring(self) -> None:
        """Wake the loop; safe from any thread and signal handler."""
        self._wakeup.ring()


class RpcThread:
    """A grpc server on an event loop of its own thread. ``engine`` is its Engine service, where there is one."""

    def __init__(
        self,
        host: str,
        port: EnginePort | None,
        *,
        prepare: Callable[[Request], None] | None = None,
        experts: ExpertsPort | None = None,
        steps: StepsPort | None = None,
    ) -> None:
        """``port``: takes requests, None = none are taken; ``prepare``: see ``EngineServicer``."""
        self._host = host
        self._steps = steps
        self._experts = experts
        self._port = port
        self._prepare = prepare
        self._loop = asyncio.new_event_loop()
        self._started = threading.Event()
        self._error: BaseException | None = None
        self._server: RpcServer | None = None
        self.engine: EngineServicer | None = None
        self._thread = threading.Thread(target=self._run, name="rpc", daemon=True)
        self._thread.start()
        if not self._started.wait(START_TIMEOUT_S):
            raise Unavailable("the rpc server did not start in time")
        if self._error is not None:
            raise self._error

    @property
    def address(self) -> str:
        """host:port."""
        assert self._server is not None
        return self._server.address

    def drain(self) -> None:
        """Report NOT_SERVING."""
        if self._server is not None:
            asyncio.run_coroutine_threadsafe(self._server.drain(), self._loop).result(START_TIMEOUT_S)

    def close(self) -> None:
        """Stop the server and the thread; idempotent."""
        if self._thread.is_alive() and self._server is not None:
            asyncio.run_coroutine_threadsafe(self._server.close(), self._loop).result(START_TIMEOUT_S)
            self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(START_TIMEOUT_S)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            services: list[Service] = []
            if self._port is not None:
                self.engine = EngineServicer(self._port, loop=self._loop, prepare=self._prepare)
                services.append(self.engine)
            if self._experts is not None:
                services.append(ExpertsServicer(self._experts))
            if self._steps is not None:
                services.append(StepsServicer(self._steps))
            self._server = RpcServer(services, host=self._host)
            self._loop.run_until_complete(self._server.start())
        except BaseException as error:  # noqa: BLE001  # the constructor raises it
            self._error = error
            return
        finally:
            self._started.set()
        self._loop.run_forever()


class EngineHost:
    """Steps one engine until told to stop."""

    def __init__(self, part: AttentionPart, telemetry: Telemetry, role: str) -> None:
        self._part = part
        self._telemetry = telemetry
        self._role = role
        self._stop = threading.Event()
        self._engine_s = 0.0  # in steps of the engine that computed something, scheduling and hand-over included
        self._window = StageWindow(attention_figures)
        self.draining = False
        self.wakeup = InboxWakeup(part.engine)
        self._waiting = part.kv_waiting
        self._waiting.add(self.wakeup)
        self.servicer: EngineServicer | None = None

    # ---- EnginePort is the engine itself; outputs come here -----------------------------------------------------

    def take(self, outputs: Sequence[RequestOutput]) -> None:
        """The engine's outbox."""
        if self.servicer is not None:
            self.servicer.deliver(outputs)
        if self._telemetry.tracing:
            for output in outputs:
                if output.times is not None:
                    self._trace(output)

    def stop(self) -> None:
        """End ``run`` after the current step; safe from any thread and signal handler."""
        self._stop.set()
        self.wakeup.ring()

    def run(self, drain_s: float) -> None:
        """Step until stopped; then finish what is in flight, for at most ``drain_s`` seconds."""
        engine = self._part.engine
        while not self._stop.is_set():
            start_s = time.perf_counter()
            if engine.step():
                self._engine_s += time.perf_counter() - start_s
            elif not engine.has_inbox:
                self._sleep()
        self.draining = True
        deadline = time.monotonic() + drain_s
        while engine.scheduler.has_requests and time.monotonic() < deadline:
            if not engine.step():
                self._waiting.wait(0.01)

    def load(self) -> WorkerLoad:
        """The worker's load now; read without locks, so figures may be a step apart."""
        scheduler, runner = self._part.engine.scheduler, self._part.worker
        stats, blocks, times = scheduler.stats, scheduler.blocks, runner.afd.times
        routers = runner.halves.routers.values()
        sums = self._sums()
        return WorkerLoad(
            num_waiting=scheduler.num_waiting,
            num_running=scheduler.num_running,
            num_free_blocks=blocks.num_free_blocks,
            num_total_blocks=blocks.num_blocks,
            num_cached_blocks=blocks.num_cached_blocks,
            num_steps=self._part.engine.num_steps,
            num_prompt_tokens=stats.num_prompt_tokens,
            num_generation_tokens=stats.num_generation_tokens,
            num_preemptions=stats.num_preemptions,
            num_prefix_hit_tokens=stats.num_prefix_hit_tokens,
            num_prefix_query_tokens=stats.num_prefix_query_tokens,
            num_peers=self._part.num_peers,
            num_kv_transfers=stats.num_kv_transfers,
            num_kv_failures=stats.num_kv_failures,
            num_expert_choices=sum(router.num_chosen for router in routers),
            num_experts_skipped=sum(router.num_skipped for router in routers),
            resident_weight_bytes=sum(self._part.resident_bytes.values()),
            gauges={
                "num_free_slots": float(runner.afd.num_free_slots),
                "num_resent": float(times.num_resent),
                **self._speculation(),
                **sums,
                **self._window.look({**sums, "num_steps": float(runner.stats.num_steps)}),
            },
        )

    def _speculation(self) -> dict[str, float]:
        """Since start, by drafter; the names are gateway.metrics.speculation's."""
        speculator = self._part.engine.scheduler.speculator
        if speculator is None:
            return {}
        stats, prefix = speculator.stats, f"speculation.{speculator.drafter.name}"
        figures = {"verifications": stats.num_verifications, "drafts": stats.num_drafts, "taken": stats.num_taken}
        return {f"{prefix}.{name}": float(value) for name, value in figures.items()}

    def _sums(self) -> dict[str, float]:
        """Since start: whoever wants a window takes two and subtracts."""
        runner = self._part.worker
        stats, times = runner.stats, runner.afd.times
        # With its FFN on its own thread a worker computes where it would wait.
        own_s = times.ffn_compute_s if self._part.ffn is not None else 0.0
        return {
            "sum_engine_s": self._engine_s,
            "sum_step_s": stats.step_s,
            "sum_attention_s": stats.attention_s,
            "sum_send_s": stats.send_s,
            "sum_head_s": stats.head_s,
            "sum_sample_s": stats.sample_s,
            "sum_blocked_s": max(0.0, times.blocked_s - own_s),
            "sum_round_trip_s": times.round_trip_s,
            "sum_ffn_compute_s": times.ffn_compute_s,
            "sum_ffn_wait_s": times.ffn_wait_s,
            "num_exchanges": float(times.num_exchanges),
        }

    def _sleep(self) -> None:
        if self._part.engine.scheduler.has_requests:
            self._waiting.wait(0.05)  # a hand-off is on its way; its lease is watched by stepping
        else:
            self._waiting.wait(IDLE_WAIT_S)

    def _trace(self, output: RequestOutput) -> None:
        times = output.times
        assert times is not None
        end_s = times.finished_s if times.finished_s is not None else time.monotonic()
        attributes = {"antiphon.request_id": output.request_id, "antiphon.role": self._role}
        scheduled_s = times.scheduled_s if times.scheduled_s is not None else end_s

        def span(name: str, start_s: float, stop_s: float, **more: int | str) -> None:
            self._telemetry.record_span(
                name,
                traceparent=output.traceparent,
                start_s=start_s,
                end_s=stop_s,
                attributes={**attributes, **more},
                error=None if output.error is None else output.error.code,
            )

        span("queue", times.arrival_s, scheduled_s)
        if self._role == "prefill":
            span("prefill", scheduled_s, end_s, **{"antiphon.cached_tokens": output.num_cached_tokens})
            return
        first_s = times.first_token_s if times.first_token_s is not None else end_s
        span(
            "prefill",
            scheduled_s,
            first_s,
            **{"antiphon.cached_tokens": output.num_cached_tokens, "antiphon.remote_tokens": output.num_remote_tokens},
        )
        if times.first_token_s is not None:
            span("decode", first_s, end_s, **{"antiphon.preemptions": output.num_preemptions})
