"""A worker process without a model, for tests of what runs workers: registers, reports, idles until SIGTERM.

Its pool's environment says how it behaves: STANDIN=ok | crash | hang | refuse; with refuse-after it starts well once only.
"""

import os
import signal
import sys
import threading
from pathlib import Path

from antiphon.apps.process.config import WorkerConfig
from antiphon.apps.process.events import EventWriter
from antiphon.core.errors import CheckpointInvalid
from antiphon.core.ids import Endpoint
from antiphon.core.worker_info import WorkerInfo, WorkerLoad
from antiphon.directory.lease import BlockingDirectory, LeaseKeeper
from antiphon.directory.memory import open_directory


def main() -> None:
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    config = WorkerConfig.from_environment()
    events = EventWriter()
    behaviour = os.environ.get("STANDIN", "ok")
    print(f"stand-in {config.worker_id} epoch {config.epoch} threads {os.environ['OMP_NUM_THREADS']}")
    print("a line that is not an event: {}", flush=True)
    if behaviour == "crash":
        print("the reason is in this line", file=sys.stderr)
        sys.exit(3)
    if behaviour == "refuse" or (behaviour == "refuse-after" and Path(os.environ["STANDIN_MARKER"]).exists()):
        events.failed(CheckpointInvalid("model.safetensors lacks model.norm.weight"))
        sys.exit(1)
    if behaviour == "refuse-after":
        Path(os.environ["STANDIN_MARKER"]).touch()
    events.stage("weights", 0.25)
    if behaviour == "hang":
        stop.wait()
        return
    info = WorkerInfo(
        worker_id=config.worker_id,
        deployment=config.deployment,
        pool=config.pool,
        role=config.role,
        model=config.model,
        revision=config.revision,
        fingerprint="stand-in",
        epoch=config.epoch,
        endpoint=Endpoint(rpc=f"{config.host}:1"),
        pid=os.getpid(),
        host=config.host,
        shard=config.shard,
        ready=True,
        load=WorkerLoad(num_total_blocks=64, num_free_blocks=64),
    )
    with (
        BlockingDirectory(open_directory(config.directory)) as directory,
        LeaseKeeper(directory, lambda: info, config.spec.directory.lease_s),
    ):
        events.ready(num_blocks=64)
        stop.wait()


main()
