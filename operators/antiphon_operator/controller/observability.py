"""What the operator tells of itself: metrics, health, structured logs (control speed).

Must not know: what is reconciled.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable

from aiohttp import web
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from antiphon_operator.log_fields import noted

_PLAIN = frozenset(logging.LogRecord("", 0, "", 0, "", (), None).__dict__) | {"message", "asctime", "taskName"}
STARTUP_BUCKETS_S = (1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 900, 1800, 3600)


class OperatorMetrics:
    """The operator's own figures, in their own registry."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.passes = Counter("antiphon_operator_reconciles", "Finished reconciles.", ("kind", "result"), registry=self.registry)
        self.seconds = Histogram("antiphon_operator_reconcile_seconds", "Time of one reconcile.", ("kind",), registry=self.registry)
        self.queued = Gauge("antiphon_operator_queued_keys", "Keys waiting or being reconciled.", registry=self.registry)
        self.startup = Histogram(
            "antiphon_operator_startup_seconds",
            "Time from applying a revision to each stage of its start.",
            ("stage",),
            buckets=STARTUP_BUCKETS_S,
            registry=self.registry,
        )
        self.leading = Gauge("antiphon_operator_leader", "1 on the replica that leads.", registry=self.registry)

    def stage(self, stage: str, took_s: float) -> None:
        """A start passed ``stage`` after ``took_s``."""
        self.startup.labels(stage=stage).observe(took_s)


class HealthServer:
    """Serves /healthz, /readyz and /metrics. Use as an async context manager; ``port`` 0 takes any free one."""

    def __init__(self, metrics: OperatorMetrics, *, host: str, port: int, ready: Callable[[], bool]) -> None:
        self._metrics = metrics
        self._host = host
        self._ready = ready
        self._runner: web.AppRunner | None = None
        self.port = port

    async def __aenter__(self) -> HealthServer:
        app = web.Application()
        app.router.add_get("/healthz", self._healthz)
        app.router.add_get("/readyz", self._readyz)
        app.router.add_get("/metrics", self._scrape)
        self._runner = web.AppRunner(app, access_log=None)  # probes every few seconds would be most of the log
        await self._runner.setup()
        await web.TCPSite(self._runner, self._host, self.port).start()
        self.port = self._runner.addresses[0][1]
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._runner is not None:
            await self._runner.cleanup()

    async def _healthz(self, _: web.Request) -> web.Response:
        return web.Response(text="ok\n")

    async def _readyz(self, _: web.Request) -> web.Response:
        ready = self._ready()
        return web.Response(text="ok\n" if ready else "starting\n", status=200 if ready else 503)

    async def _scrape(self, _: web.Request) -> web.Response:
        body = generate_latest(self._metrics.registry)
        return web.Response(body=body, headers={"Content-Type": CONTENT_TYPE_LATEST})


class JsonFormatter(logging.Formatter):
    """One JSON object a line, with what its pass has noted."""

    def format(self, record: logging.LogRecord) -> str:
        """The line of ``record``."""
        value: dict[str, object] = {
            "time": self.formatTime(record, "%Y-%m-%dT%H:%M:%S%z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **noted(),
        }
        value |= {key: str(inner) for key, inner in record.__dict__.items() if key not in _PLAIN}
        if record.exc_info:
            value["exception"] = self.formatException(record.exc_info)
        return json.dumps(value, ensure_ascii=False)


def configure_logs(level: str = "INFO") -> None:
    """One JSON object a line on standard error."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter())
    logging.basicConfig(level=level, handlers=[handler], force=True)
    # Objects' bodies are logged by kopf at debug level only; keep them out whatever the level is.
    logging.getLogger("kopf.objects").setLevel(logging.WARNING)
    logging.getLogger("httpx2").setLevel(logging.WARNING)
