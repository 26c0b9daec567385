"""A supervisor keeps one real process running: claims, restarts, failures, shutdown."""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from antiphon.apps.process.config import LogSettings
from antiphon.apps.serve.plan import PoolTemplate
from antiphon.apps.supervision.event_log import EventLog
from antiphon.apps.supervision.supervisor import RestartLimits, SupervisorState, WorkerSupervisor
from antiphon.core.document.spec import LLMDeployment
from antiphon.core.errors import DeadlineExceeded, Unavailable
from antiphon.directory.lease import BlockingDirectory
from antiphon.directory.memory import MemoryDirectory, open_directory
from antiphon.rpc.directory.service import DirectoryServer

STANDIN = (sys.executable, str(Path(__file__).with_name("standin_worker.py")))
QUICK = RestartLimits(start_timeout_s=30, backoff_s=0.01, max_backoff_s=0.05, max_failures=2)
READY_S = 30.0


def template(
    address: str, *, replicas: int = 1, tensor: int = 1, lease_s: float = 2.0, env: dict[str, str] | None = None, **pool: object
) -> PoolTemplate:
    document = LLMDeployment.model_validate(
        {
            "apiVersion": "serving.antiphon.dev/v1alpha1",
            "kind": "LLMDeployment",
            "metadata": {"name": "demo"},
            "spec": {
                "model": {"uri": "/nowhere"},
                "topology": "afd",
                "directory": {"leaseS": lease_s},
                "pools": [
                    {"name": "attention", "role": "attention"},
                    {
                        "name": "ffn",
                        "role": "ffn",
                        "replicas": replicas,
                        "parallelism": {"tensor": tensor},
                        "env": env or {},
                        **pool,
                    },
                ],
            },
        }
    )
    return PoolTemplate(
        document=document, pool="ffn", checkpoint="/nowhere", directory=address, host="127.0.0.1", drain_s=2.0, log=LogSettings()
    )


class Hosted:
    """A directory on a thread of its own, as replicas of other processes would see it."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._server = self._run(DirectoryServer.start(MemoryDirectory()))
        self.address = self._server.address
        self.client = BlockingDirectory(open_directory(self.address))

    def restart_empty(self) -> None:
        port = int(self.address.rpartition(":")[2])
        self._run(self._server.close(0))
        self._server = self._run(DirectoryServer.start(MemoryDirectory(epoch_base=1000), port=port))

    def close(self) -> None:
        self.client.close()
        self._run(self._server.close(0))
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def _run(self, call):
        return asyncio.run_coroutine_threadsafe(call, self._loop).result(10)


@pytest.fixture
def hosted() -> Iterator[Hosted]:
    host = Hosted()
    yield host
    host.close()


def supervisor(
    hosted: Hosted, run_dir: Path, plan: PoolTemplate, owner: str = "a", limits: RestartLimits = QUICK
) -> WorkerSupervisor:
    return WorkerSupervisor(plan, directory=hosted.client, owner=owner, run_dir=run_dir, argv=STANDIN, limits=limits)


def eventually(condition: Callable[[], bool], within_s: float = READY_S) -> None:
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, "it did not become true in time"
        time.sleep(0.01)


def alive(pid: int) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False


def test_a_worker_is_started_registered_and_stopped(hosted: Hosted, tmp_path: Path) -> None:
    with supervisor(hosted, tmp_path, template(hosted.address, threads=1)) as supervised:
        status = supervised.wait_ready(READY_S)
        assert (status.worker_id, status.epoch, status.num_restarts) == ("demo/ffn/0", 1, 0)
        assert status.facts["num_blocks"] == 64
        (record,) = hosted.client.workers("demo")
        assert (record.info.pid, record.info.epoch) == (status.pid, 1)
    assert not alive(status.pid)
    assert list(hosted.client.workers()) == []
    assert supervised.status().state is SupervisorState.STOPPED


def test_the_journal_and_the_log_tell_what_happened(hosted: Hosted, tmp_path: Path) -> None:
    with supervisor(hosted, tmp_path, template(hosted.address, threads=3)) as supervised:
        supervised.wait_ready(READY_S)
    entries = EventLog(tmp_path).read()
    assert [(e.kind, e.subject) for e in entries] == [(kind, "ffn/0") for kind in ("started", "stage", "ready", "exited")]
    assert (entries[1].stage, entries[1].seconds) == ("weights", 0.25)
    assert "threads 3" in Path(entries[0].log).read_text()


def test_the_configuration_is_for_its_owner_only(hosted: Hosted, tmp_path: Path) -> None:
    with supervisor(hosted, tmp_path, template(hosted.address)) as supervised:
        supervised.wait_ready(READY_S)
        assert (tmp_path / "ffn-0.json").stat().st_mode & 0o077 == 0


def test_a_worker_that_dies_is_restarted_with_its_index_and_a_higher_epoch(hosted: Hosted, tmp_path: Path) -> None:
    with supervisor(hosted, tmp_path, template(hosted.address)) as supervised:
        first = supervised.wait_ready(READY_S)
        os.kill(first.pid, signal.SIGKILL)
        eventually(lambda: supervised.status().state is SupervisorState.READY and supervised.status().pid != first.pid)
        second = supervised.status()
        assert (second.worker_id, second.num_restarts) == (first.worker_id, 1)
        assert second.epoch > first.epoch
        assert "SIGKILL" in second.message
        (record,) = hosted.client.workers()
        assert record.info.epoch == second.epoch


def test_a_worker_that_can_not_start_fails_at_once_and_says_why(hosted: Hosted, tmp_path: Path) -> None:
    with (
        supervisor(hosted, tmp_path, template(hosted.address, env={"STANDIN": "crash"})) as supervised,
        pytest.raises(Unavailable, match=r"(?s)demo/ffn/0 did not start: it exited with code 3.*the reason is in this line"),
    ):
        supervised.wait_ready(READY_S)
    assert supervised.status().state is SupervisorState.FAILED


def test_the_reason_a_worker_gives_itself_is_passed_on(hosted: Hosted, tmp_path: Path) -> None:
    with (
        supervisor(hosted, tmp_path, template(hosted.address, env={"STANDIN": "refuse"})) as supervised,
        pytest.raises(Unavailable, match=r"lacks model\.norm\.weight"),
    ):
        supervised.wait_ready(READY_S)


def test_a_worker_that_keeps_failing_is_given_up(hosted: Hosted, tmp_path: Path) -> None:
    env = {"STANDIN": "refuse-after", "STANDIN_MARKER": str(tmp_path / "marker")}
    with supervisor(hosted, tmp_path, template(hosted.address, env=env)) as supervised:
        os.kill(supervised.wait_ready(READY_S).pid, signal.SIGKILL)
        eventually(lambda: supervised.status().state is SupervisorState.FAILED)
        with pytest.raises(Unavailable, match="3 times in a row"):
            supervised.check()


def test_a_worker_that_was_ready_is_started_again_however_often_it_is_killed(hosted: Hosted, tmp_path: Path) -> None:
    with supervisor(hosted, tmp_path, template(hosted.address)) as supervised:
        for _ in range(QUICK.max_failures + 2):
            killed = supervised.wait_ready(READY_S).pid
            os.kill(killed, signal.SIGKILL)
            eventually(
                lambda killed=killed: supervised.status().state is SupervisorState.READY and supervised.status().pid != killed
            )
        supervised.check()


def test_a_worker_that_never_gets_ready_is_ended_at_its_deadline(hosted: Hosted, tmp_path: Path) -> None:
    limits = RestartLimits(start_timeout_s=1.0)
    with (
        supervisor(hosted, tmp_path, template(hosted.address, lease_s=1, env={"STANDIN": "hang"}), limits=limits) as supervised,
        pytest.raises(Unavailable, match="not ready after 1 s"),
    ):
        supervised.wait_ready(READY_S)
    assert not alive(EventLog(tmp_path).read()[0].pid)


def test_waiting_for_a_slow_worker_has_a_deadline(hosted: Hosted, tmp_path: Path) -> None:
    with (
        supervisor(hosted, tmp_path, template(hosted.address, env={"STANDIN": "hang"})) as supervised,
        pytest.raises(DeadlineExceeded),
    ):
        supervised.wait_ready(0.1)


def test_replicas_of_a_sharded_pool_hold_each_shard_once(hosted: Hosted, tmp_path: Path) -> None:
    plan = template(hosted.address, replicas=3, tensor=3)
    with contextlib.ExitStack() as stack:
        group = [stack.enter_context(supervisor(hosted, tmp_path, plan, owner)) for owner in "abc"]
        for supervised in group:
            supervised.wait_ready(READY_S)
        records = hosted.client.workers()
    assert [r.info.worker_id for r in records] == ["demo/ffn/0", "demo/ffn/1", "demo/ffn/2"]
    assert [r.info.shard.tensor_index for r in records] == [0, 1, 2]


def test_a_replacement_takes_the_index_and_shard_of_the_lost_replica(hosted: Hosted, tmp_path: Path) -> None:
    plan = template(hosted.address, replicas=2, tensor=2, lease_s=1)
    client = hosted.client
    revision = plan.revision
    # A replica that is gone without a word: it held rank 0, and nobody renews it.
    assert client.claim_index("demo", f"ffn@{revision}", "lost", 1.0) == 0
    assert client.claim_index("demo", "ffn", f"{revision}:0", 1.0) == 0
    with (
        supervisor(hosted, tmp_path, plan, "survivor") as survivor,
        supervisor(hosted, tmp_path, plan, "replacement") as replacement,
    ):
        ids = {survivor.wait_ready(READY_S).worker_id, replacement.wait_ready(READY_S).worker_id}
    assert ids == {"demo/ffn/0", "demo/ffn/1"}


def test_two_revisions_of_a_pool_live_side_by_side_under_different_ids(hosted: Hosted, tmp_path: Path) -> None:
    old = template(hosted.address, replicas=1)
    raw = old.document.model_dump(mode="json", by_alias=True)
    raw["spec"]["model"]["uri"] = "/elsewhere"
    new = PoolTemplate(
        document=LLMDeployment.model_validate(raw),
        pool="ffn",
        checkpoint="/elsewhere",
        directory=hosted.address,
        host="127.0.0.1",
        drain_s=2.0,
        log=LogSettings(),
    )
    with supervisor(hosted, tmp_path, old, "a") as first, supervisor(hosted, tmp_path, new, "b") as second:
        assert {s.wait_ready(READY_S).worker_id for s in (first, second)} == {"demo/ffn/0", "demo/ffn/1"}
        assert {r.info.revision for r in hosted.client.workers()} == {old.revision, new.revision}


def test_everybody_is_back_after_the_directory_restarted_empty(hosted: Hosted, tmp_path: Path) -> None:
    plan = template(hosted.address, replicas=2, lease_s=1)
    with supervisor(hosted, tmp_path, plan, "a") as first, supervisor(hosted, tmp_path, plan, "b") as second:
        pids = {first.wait_ready(READY_S).pid, second.wait_ready(READY_S).pid}
        hosted.restart_empty()
        eventually(lambda: {r.info.pid for r in hosted.client.workers()} == pids)
        assert (first.status().num_restarts, second.status().num_restarts) == (0, 0)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="parent-death signals are Linux'")
def test_a_worker_does_not_outlive_a_supervisor_that_is_killed(hosted: Hosted, tmp_path: Path) -> None:
    host = tmp_path / "host.py"
    host.write_text(
        textwrap.dedent(f"""
        import sys, time
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from test_supervisor import *
        plan = template({hosted.address!r})
        client = BlockingDirectory(open_directory({hosted.address!r}))
        run_dir = Path({str(tmp_path)!r})
        supervised = WorkerSupervisor(plan, directory=client, owner="x", run_dir=run_dir, argv=STANDIN, limits=QUICK)
        print(supervised.wait_ready(READY_S).pid, flush=True)
        time.sleep(600)
        """)
    )
    with subprocess.Popen([sys.executable, str(host)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        pid = int(process.stdout.readline())
        assert alive(pid)
        process.kill()
    eventually(lambda: not alive(pid))


def test_closing_twice_and_while_starting_is_harmless(hosted: Hosted, tmp_path: Path) -> None:
    supervised = supervisor(hosted, tmp_path, template(hosted.address, env={"STANDIN": "hang"}))
    eventually(lambda: supervised.status().pid > 0)
    pid = supervised.status().pid
    supervised.close()
    supervised.close()
    assert not alive(pid)
