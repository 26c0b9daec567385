"""The process of one encoder worker: registers it, runs its loop, takes it down (control speed around a step loop).

An encoder has no peers: it is ready as soon as its weights are read. Must not know: Ray.
"""

from __future__ import annotations

import gc
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from hashlib import blake2b
from pathlib import Path

import psutil

from antiphon.apps.process.config import WorkerConfig
from antiphon.apps.process.engine_host import IDLE_WAIT_S, InboxWakeup, RpcThread
from antiphon.apps.process.events import EventWriter
from antiphon.apps.process.lifecycle import SWITCH_INTERVAL_S, Watch, begin, device_of, record_of
from antiphon.apps.process.pinning import unpinned
from antiphon.apps.process.wiring.resolve import dtype_of
from antiphon.core.document.spec import LLMDeploymentSpec
from antiphon.core.errors import InternalError, InvalidInput
from antiphon.core.ids import Endpoint
from antiphon.core.request import RequestOutput
from antiphon.core.worker_info import WorkerInfo, WorkerLoad
from antiphon.device.device import CPU, Device
from antiphon.directory.lease import BlockingDirectory, LeaseKeeper
from antiphon.directory.memory import open_directory
from antiphon.engine.batches import BatchEngine
from antiphon.engine.core import Outbox
from antiphon.engine.limits import SchedulerConfig
from antiphon.models.encoders.bert import Bert, describe
from antiphon.models.loading.checkpoint import Checkpoint
from antiphon.models.pooling.facts import check_topology, read_pooling
from antiphon.models.pooling.pooler import Pooler
from antiphon.transport.waiting import WaitSet
from antiphon.worker.encoding.encoder_worker import EncoderWorker


class EncoderPart:
    """An encoder's engine with what its process tells about it."""

    def __init__(
        self, spec: LLMDeploymentSpec, checkpoint_dir: str, outbox: Outbox, clock: Callable[[], float], device: Device = CPU
    ) -> None:
        """Reads the weights.

        Raises:
            CheckpointInvalid, UnsupportedModel: the checkpoint can't be served.
            InvalidInput: the document asks for what an encoder has not.
        """
        checkpoint = Checkpoint.open(Path(checkpoint_dir))
        pooling = read_pooling(checkpoint.path, spec.model.task)
        assert pooling is not None  # whoever makes this has asked whether it is an encoder
        check_topology(spec.topology, pooling)
        if spec.model.quantization != "none":
            raise InvalidInput("encoders are not quantized: expected none", "spec.model.quantization")
        config = describe(checkpoint.config)
        asked = spec.model.max_model_len
        if asked is not None and asked > config.max_position:
            raise InvalidInput(f"maxModelLen {asked} is more than the model's {config.max_position}", "spec.model.maxModelLen")
        dtype = dtype_of(spec, checkpoint)
        self.vocab_size = config.vocab_size
        self.max_model_len = asked if asked is not None else min(config.max_position, pooling.max_tokens or config.max_position)
        self.fingerprint = blake2b(f"{checkpoint.digest}/{config.fingerprint}/{dtype}".encode(), digest_size=8).hexdigest()
        self.worker = EncoderWorker(Bert(config, checkpoint, dtype, device.torch), Pooler(pooling, checkpoint, dtype, device.torch))
        checkpoint.close()
        self.engine = BatchEngine(
            SchedulerConfig(
                max_num_seqs=spec.scheduler.max_num_seqs,
                max_num_batched_tokens=spec.scheduler.max_num_batched_tokens,
                max_queued_requests=spec.scheduler.max_queued_requests,
                max_model_len=self.max_model_len,
                block_size_tokens=1,
                num_blocks=0,
                vocab_size=config.vocab_size,
            ),
            self.worker.compute,
            outbox,
            clock,
            self.worker.check,
        )


class EncoderProcess:
    """One worker. Built in its process's main thread, which then calls ``run``; ``stop`` is safe from signal handlers."""

    def __init__(self, config: WorkerConfig, events: EventWriter) -> None:
        """Build the worker up to its door.

        Raises:
            AntiphonError: checkpoint, document or addresses can't be used.
        """
        self._config = config
        self._events = events
        self._stop = threading.Event()
        self._ready = False
        self._message = "starting"
        self._busy_s = 0.0
        self._closers: list[Callable[[], None]] = []
        self._closers.append(begin(config).close)
        with events.timed("weights"):
            self._part = EncoderPart(config.spec, config.checkpoint, self._take, time.monotonic, device_of(config))
        self._wakeup = InboxWakeup(self._part.engine)
        self._waiting = WaitSet()
        self._waiting.add(self._wakeup)
        with events.timed("listeners"), unpinned():
            self._rpc = RpcThread(config.host, self._part.engine)
            self._closers.append(self._rpc.close)
            self._directory = BlockingDirectory(open_directory(config.directory))
        self._closers.append(self._directory.close)

    def run(self, started_s: float) -> None:
        """Register, and serve until ``stop``.

        Raises:
            AntiphonError: what ended the worker.
        """
        with unpinned():
            lease = LeaseKeeper(self._directory, self._describe, self._config.spec.directory.lease_s)
        self._closers.append(lease.close)
        with lease:
            gc.collect()
            gc.freeze()
            self._ready, self._message = True, ""
            lease.renew_soon()
            self._events.stage("total", time.monotonic() - started_s)
            self._events.ready(address=self._rpc.address, resident_weight_bytes=sum(self._part.worker.resident_bytes.values()))
            watch = Watch(self._config, lease, others=lambda: None, stopping=self._stop, stop=self.stop)
            watch.start()
            try:
                self._loop()
            except BaseException:
                if self._rpc.engine is not None:
                    self._rpc.engine.fail(InternalError(f"worker {self._config.worker_id} failed"))
                raise
            self._ready, self._message = False, "stopped"
        watch.raise_failure()

    def stop(self) -> None:
        """Drain and end ``run``."""
        self._stop.set()
        self._wakeup.ring()

    def close(self) -> None:
        """Give everything back; idempotent."""
        while self._closers:
            self._closers.pop()()

    def _loop(self) -> None:
        sys.setswitchinterval(SWITCH_INTERVAL_S)
        engine = self._part.engine
        while not self._stop.is_set():
            if not self._step() and not engine.has_inbox:
                self._waiting.wait(IDLE_WAIT_S)
        deadline = time.monotonic() + self._config.drain_s
        while engine.has_requests and time.monotonic() < deadline:
            self._step()

    def _step(self) -> bool:
        start_s = time.perf_counter()
        had_work = self._part.engine.step()
        if had_work:
            self._busy_s += time.perf_counter() - start_s
        return had_work

    def _take(self, outputs: Sequence[RequestOutput]) -> None:
        if self._rpc.engine is not None:
            self._rpc.engine.deliver(outputs)

    def _describe(self) -> WorkerInfo:
        part, engine = self._part, self._part.engine
        record = record_of(
            self._config,
            Endpoint(rpc=self._rpc.address),
            fingerprint=part.fingerprint,
            max_model_len=part.max_model_len,
            vocab_size=part.vocab_size,
        )
        load = WorkerLoad(
            num_waiting=engine.num_waiting,
            num_running=engine.num_running,
            num_steps=engine.num_steps,
            num_prompt_tokens=engine.stats.num_prompt_tokens,
            resident_weight_bytes=sum(part.worker.resident_bytes.values()),
            resident_memory_bytes=psutil.Process().memory_info().rss,
            gauges={"sum_engine_s": self._busy_s},
        )
        return replace(record, ready=self._ready, draining=self._stop.is_set(), message=self._message, load=load)
