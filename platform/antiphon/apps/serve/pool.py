"""A pool replica on Ray Serve: supervises one worker process and answers for its health (control speed).

The worker computes in a process of its own, so that its spinning loop never delays this replica's event loop.
Must not know: tokens, tensors, or the gateway.
"""

from __future__ import annotations

import asyncio
import json
import tempfile
from pathlib import Path

from ray import serve

from antiphon.apps.on_ray.joining import take_environment
from antiphon.apps.serve.directory_actor import directory_address, node_address
from antiphon.apps.serve.plan import PoolTemplate, ServeSettings
from antiphon.apps.serve.ray_runtime import keep_serve_on_loopback
from antiphon.apps.supervision.supervisor import DEFAULT_ARGV, RestartLimits, WorkerStatus, WorkerSupervisor
from antiphon.apps.tiers.plan import TierPool
from antiphon.core.document.spec import LLMDeployment
from antiphon.directory.lease import BlockingDirectory
from antiphon.directory.memory import open_directory
from antiphon.models.loading.source import resolve

_STOP_MARGIN_S = 5.0


class PoolReplica:
    """The Serve deployment's class. Its constructor returns when the worker is ready, or raises what kept it from that."""

    def __init__(self, document_json: str, pool: str, settings: ServeSettings, tier_pool_json: str = "") -> None:
        """``tier_pool_json``: the experts that share the worker's process; "" = none."""
        take_environment()
        keep_serve_on_loopback()
        self._tier_pool = TierPool.from_value(json.loads(tier_pool_json)) if tier_pool_json else None
        self._document = LLMDeployment.model_validate_json(document_json)
        self._pool = pool
        self._settings = settings
        self._supervisor: WorkerSupervisor | None = None
        self._directory: BlockingDirectory | None = None
        self._scratch: tempfile.TemporaryDirectory[str] | None = None
        self._owner = str(serve.get_replica_context().replica_id.unique_id)
        try:
            self._start().wait_ready(settings.start_timeout_s + _STOP_MARGIN_S)
        except BaseException:
            self._close()
            raise

    async def check_health(self) -> None:
        """Serve's probe: raises once the worker was given up; then Serve replaces this replica."""
        if self._supervisor is not None:
            self._supervisor.check()

    async def status(self) -> WorkerStatus:
        """Where the worker stands."""
        assert self._supervisor is not None
        return self._supervisor.status()

    async def __del__(self) -> None:
        await asyncio.to_thread(self._close)

    def _start(self) -> WorkerSupervisor:
        settings, spec = self._settings, self._document.spec
        if settings.run_dir is None:
            self._scratch = tempfile.TemporaryDirectory(prefix=f"antiphon-{self._pool}-")
        address = directory_address(self._document, settings)
        self._directory = BlockingDirectory(open_directory(address))
        template = PoolTemplate(
            document=self._document,
            pool=self._pool,
            checkpoint=settings.checkpoint or str(resolve(spec.model.uri, spec.model.revision)),
            directory=address,
            host=settings.host or node_address(),
            drain_s=settings.drain_s,
            log=settings.log,
            tier_pool=self._tier_pool,
            cards=settings.cards.get((self._document.metadata.name, self._pool), ()),
            fork_server=settings.fork_server,
        )
        self._supervisor = WorkerSupervisor(
            template,
            directory=self._directory,
            owner=self._owner,
            run_dir=Path(self._scratch.name if self._scratch is not None else settings.run_dir or ""),
            argv=settings.worker_argv or DEFAULT_ARGV,
            limits=RestartLimits(start_timeout_s=settings.start_timeout_s),
        )
        return self._supervisor

    def _close(self) -> None:
        if self._supervisor is not None:
            self._supervisor.close()
        if self._directory is not None:
            self._directory.close()
        if self._scratch is not None:
            self._scratch.cleanup()
