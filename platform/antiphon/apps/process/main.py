"""The data-plane process of one worker: builds it, registers it, runs its loop, and takes it down (control speed).

    STARTING ──weights, listeners, links──► READY ──SIGTERM──► DRAINING ──► exit 0
        └── any error ──► "failed" event, exit 1               (READY, any error: the same)

Started by the pool replica that supervises it, with its configuration in the environment. Must not know: Ray.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

from antiphon.apps.process.config import WorkerConfig
from antiphon.apps.process.events import EventWriter
from antiphon.core.errors import AntiphonError, InternalError
from antiphon.models.pooling.facts import is_encoder

if TYPE_CHECKING:  # imported when it is known which of them is needed
    from antiphon.apps.encoders.process import EncoderProcess
    from antiphon.apps.process.worker_process import WorkerProcess
    from antiphon.apps.tiers.process import TierProcess

logger = logging.getLogger(__name__)


def main() -> int:
    """Run one worker until told to stop; the exit status."""
    started_s = time.monotonic()
    events = EventWriter()
    try:
        config = WorkerConfig.from_environment()
        process: WorkerProcess | TierProcess | EncoderProcess
        if config.tier_pool is not None:
            with events.timed("imports"):
                from antiphon.apps.tiers.process import TierProcess
            process = TierProcess(config, config.tier_pool, events)
        elif is_encoder(Path(config.checkpoint), config.spec.model.task):
            with events.timed("imports"):
                from antiphon.apps.encoders.process import EncoderProcess
            process = EncoderProcess(config, events)
        else:
            with events.timed("imports"):
                from antiphon.apps.process.worker_process import WorkerProcess
            process = WorkerProcess(config, events)
    except Exception as error:  # noqa: BLE001  # the last door of the process: the supervisor gets the reason
        events.failed(error)
        return _fail(error)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: process.stop())
    try:
        process.run(started_s)
    except Exception as error:  # noqa: BLE001
        events.failed(error)
        return _fail(error)
    finally:
        process.close()
    return 0


def _fail(error: Exception) -> int:
    if isinstance(error, AntiphonError) and not isinstance(error, InternalError):
        logger.error("%s: %s", error.code, error)
        print(f"error: {error}", file=sys.stderr)  # noqa: T201  # the log's last line
    else:
        logger.exception("the worker failed")
    return 1


def _exit(status: int) -> None:
    # Daemon threads of grpc may still be closing; nothing of ours is left to flush but these.
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    if threading.active_count() > 1:
        os._exit(status)
    sys.exit(status)


if __name__ == "__main__":
    _exit(main())
