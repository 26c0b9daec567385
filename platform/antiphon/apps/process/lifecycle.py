"""What every data-plane process does around its loop: its beginning, its watch, the lasting part of its record (control speed).

    begin ──► (weights, doors) ──► registered, watched ──► loop ──► stop asked, or the watch saw a failure ──► raise_failure

Must not know: roles, Ray.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
from collections.abc import Callable

import torch

from antiphon.apps.process.config import WorkerConfig
from antiphon.apps.process.pinning import pin_each, unpinned
from antiphon.core.device import memory_share
from antiphon.core.errors import Unavailable
from antiphon.core.ids import Endpoint
from antiphon.core.worker_info import WorkerInfo
from antiphon.device.device import Device, open_device
from antiphon.directory.lease import LeaseKeeper
from antiphon.models.attention.kv_cache import KVCache
from antiphon.telemetry import Telemetry, configure_logging, setup

# How long another thread may keep the GIL that the loop wants back, after every operator and every wait. Python's own 5 ms would be
# a stall of several layers whenever the rpc thread or the lease has something to do.
SWITCH_INTERVAL_S = 200e-6
_WATCH_S = 1.0
_LEAST_PRIORITY = 19


def device_of(config: WorkerConfig) -> Device:
    """Open the device that the worker's pool asks for. Raises InvalidInput, which names the field."""
    pool = config.pool_spec
    field = f"spec.pools[{config.spec.pools.index(pool)}].resources.gpu"
    return open_device(pool.worker_device, memory_share(pool), field)


def begin(config: WorkerConfig) -> Telemetry:
    """Logs, telemetry (close it), compute threads and their processors, before anything is computed."""
    configure_logging(config.log.level, json=config.log.format == "json", worker=config.worker_id, generation=config.epoch)
    telemetry = setup(
        f"antiphon-{config.role.value}",
        attributes={"service.instance.id": config.worker_id, "antiphon.deployment": config.deployment},
    )
    torch.set_num_threads(config.threads)
    pin_each(config.cores, share=config.shares_cores)
    return telemetry


def record_of(config: WorkerConfig, endpoint: Endpoint, *, fingerprint: str, max_model_len: int, vocab_size: int) -> WorkerInfo:
    """What of a worker's record never changes; ``ready``, ``draining``, ``message`` and ``load`` are the process' to add."""
    return WorkerInfo(
        worker_id=config.worker_id,
        deployment=config.deployment,
        pool=config.pool,
        role=config.role,
        model=config.model,
        revision=config.revision,
        fingerprint=fingerprint,
        epoch=config.epoch,
        endpoint=endpoint,
        pid=os.getpid(),
        host=socket.gethostname(),
        shard=config.shard,
        max_model_len=max_model_len,
        vocab_size=vocab_size,
        max_num_seqs=config.spec.scheduler.max_num_seqs,
        max_queued_requests=config.spec.scheduler.max_queued_requests,
        document_revision=config.document_revision,
    )


def fill_memory(cache: KVCache, is_unwanted: Callable[[], bool]) -> None:
    """Take the memory of a cache beside the loop, when nothing else wants the processor."""

    def fill() -> None:
        if sys.platform == "linux":  # a thread has a priority of its own there
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _LEAST_PRIORITY)
        cache.populate(is_unwanted)

    with unpinned():
        threading.Thread(target=fill, name="kv-memory", daemon=True).start()


class Watch:
    """Stops a loop when a thread beside it has failed, or another process took this worker's place.

    Args:
        config: whose loop.
        lease: of its record.
        others: raises what other threads failed with.
        stopping: set once the loop is to end; the watch ends with it.
        stop: ends the loop.
    """

    def __init__(
        self,
        config: WorkerConfig,
        lease: LeaseKeeper,
        *,
        others: Callable[[], None],
        stopping: threading.Event,
        stop: Callable[[], None],
    ) -> None:
        self._worker_id = config.worker_id
        self._lease = lease
        self._others = others
        self._stopping = stopping
        self._stop = stop
        self._failure: BaseException | None = None

    def start(self) -> None:
        """Look once a second from now on."""
        threading.Thread(target=self._run, name="watch", daemon=True).start()

    def raise_failure(self) -> None:
        """Raise why the loop was stopped, if it was by this."""
        if self._failure is not None:
            raise self._failure

    def _run(self) -> None:
        while not self._stopping.wait(_WATCH_S):
            try:
                self._lease.check()
                self._others()
                if self._lease.superseded:
                    raise Unavailable(f"{self._worker_id} was replaced by a newer epoch")
            except BaseException as error:  # noqa: BLE001  # raised by raise_failure
                self._failure = error
                self._stop()
                return
