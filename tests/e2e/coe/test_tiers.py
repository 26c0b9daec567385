"""Three experts with room for two behind one name: real processes, asked over HTTP."""

import contextlib
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import grpc
import httpx
import psutil
import pytest
from tokenizers import Tokenizer

from antiphon.apps.serve.deployment_set import serving_of
from antiphon.apps.serve.local import DirectDeployment, running, wait_ready
from antiphon.apps.serve.plan import ServeSettings
from antiphon.core.document.loading import parse_object
from antiphon.core.errors import SpecInvalid
from antiphon.core.identity import Identity, new_key
from antiphon.rpc.credentials import TARGET_OPTIONS, channel_credentials
from antiphon.testing import LocalCluster, wiring, write_tiny_llama

NAMES = ("red", "green", "blue")
PROMPT = "What is that over there?"
NUM_TOKENS = 6
WAIT_S = 60.0
LINUX = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="who holds a directory is looked up in /proc")


def _deployment(name: str, checkpoint: Path, **pool: Any) -> dict[str, Any]:
    return {
        "apiVersion": "serving.antiphon.dev/v1alpha1",
        "kind": "LLMDeployment",
        "metadata": {"name": name},
        "spec": {
            "model": {"uri": str(checkpoint), "dtype": "float32"},
            "pools": [{"name": "monolith", "role": "monolith", **pool}],
            "cache": {"numBlocks": 64},
            "endpoint": {"httpPort": 0, "grpcPort": 0},
        },
    }


def _composition(**tiers: Any) -> dict[str, Any]:
    return {
        "apiVersion": "serving.antiphon.dev/v1alpha1",
        "kind": "CompositionOfExperts",
        "metadata": {"name": "colours"},
        "spec": {
            "experts": [{"name": name, "deploymentRef": name, "memory": "100Ki"} for name in NAMES],
            "general": "red",
            "tiers": {"residentMemory": "250Ki", "hostMemory": "1Mi", **tiers},
        },
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    http: httpx.Client
    expected: dict[str, str]

    def ask(self, expert: str) -> httpx.Response:
        body = {"model": "coe/colours", "prompt": PROMPT, "max_tokens": NUM_TOKENS, "temperature": 0}
        answer = self.http.post("/v1/completions", json=body, headers={"x-antiphon-expert": expert})
        assert answer.status_code == 200, answer.text
        assert answer.json()["choices"][0]["text"] == self.expected[expert]
        return answer

    def is_answering(self, expert: str) -> bool:
        body = {"model": "coe/colours", "prompt": PROMPT, "max_tokens": 1}
        answer = self.http.post("/v1/completions", json=body, headers={"x-antiphon-expert": expert})
        return answer.status_code == 200 and answer.headers["x-antiphon-expert"] == expert

    def experts(self) -> dict[str, dict[str, Any]]:
        return {e["name"]: e for e in self.http.get("/v1/experts").json()["data"]}

    def away(self) -> list[str]:
        return [name for name, expert in self.experts().items() if not expert["resident"]]

    def waited_for(self) -> list[str]:
        """The experts that a decision would have to wait for."""
        decision = self.http.post("/v1/route", json={"model": "coe/colours", "prompt": PROMPT}).json()
        return [candidate["expert"] for candidate in decision["candidates"] if candidate["wait"] > 0]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    root = tmp_path_factory.mktemp("tiers")
    checkpoints = {name: write_tiny_llama(root / name, seed=seed) for seed, name in enumerate(NAMES)}
    expected = {}
    for name, path in checkpoints.items():
        tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
        with LocalCluster(wiring(path, "monolith", cache={"numBlocks": 64}), path) as cluster:
            tokens = cluster.generate(tuple(tokenizer.encode(PROMPT).ids), max_tokens=NUM_TOKENS)
        expected[name] = tokenizer.decode(list(tokens))
    documents = [_deployment(name, path) for name, path in checkpoints.items()]
    serving = serving_of([parse_object(d, "test") for d in [*documents, _composition()]], "test")
    serving = replace(serving, checkpoints={name: str(path) for name, path in checkpoints.items()})
    run_dir = root / "run"
    run_dir.mkdir()
    with DirectDeployment(serving, run_dir=run_dir, settings=ServeSettings(drain_s=1.0)) as deployment:
        deployment.start()
        wait_ready(deployment, WAIT_S)
        ports = running(run_dir).ports
        assert ports is not None
        with httpx.Client(base_url=f"http://{ports.host}:{ports.http_port}", timeout=WAIT_S, trust_env=False) as http:
            made = World(http=http, expected=expected)
            _eventually(lambda: len(made.away()) == 1)
            yield made


def _eventually(true: Callable[[], bool]) -> None:
    end_s = time.monotonic() + WAIT_S
    while not true():
        assert time.monotonic() < end_s
        time.sleep(0.02)


@pytest.mark.cluster
def test_one_process_serves_all_and_every_answer_is_its_experts_own(world: World) -> None:
    for expert in [*NAMES, *reversed(NAMES)]:
        assert world.ask(expert).headers["x-antiphon-expert"] == expert
    workers = world.http.get("/status").json()["workers"]
    assert len({worker["pid"] for worker in workers}) == 1
    assert len(workers) == 3


@pytest.mark.cluster
def test_the_router_sees_who_is_away_and_what_a_switch_costs(world: World) -> None:
    # The pool may still be changing over after the questions before: the decision follows within a look at its records.
    _eventually(lambda: len(world.away()) == 1 and world.waited_for() == world.away())
    (away,) = world.away()
    assert world.experts()[away]["load_s"] > 0
    world.ask(away)
    _eventually(lambda: len(world.away()) == 1 and away not in world.away())
    _eventually(lambda: away not in world.waited_for())


@pytest.mark.cluster
def test_what_the_gateway_decided_is_expected_by_the_pool_so_that_it_stays(world: World) -> None:
    for _ in range(12):
        world.ask("blue")
    _eventually(lambda: "blue" not in world.away())
    for other in ("red", "green", "red", "green"):
        world.ask(other)
        _eventually(lambda other=other: other not in world.away())
        assert "blue" not in world.away()


@pytest.mark.cluster
def test_load_times_of_every_stage_are_in_the_metrics(world: World) -> None:
    for expert in NAMES:
        world.ask(expert)
    _eventually(lambda: all(f'antiphon_deployment="{name}"' in _lines(world, "antiphon_tier_load_time_seconds") for name in NAMES))
    text = _lines(world, "antiphon_tier_load_time_seconds")
    assert all(f'stage="{stage}"' in text for stage in ("evict", "read", "convert", "ready"))
    assert "antiphon_tier_loads_total" in _lines(world, "antiphon_tier_loads_total")


def _lines(world: World, name: str) -> str:
    return "\n".join(line for line in world.http.get("/metrics").text.splitlines() if line.startswith(name))


def _held() -> dict[Path, int]:
    """Directories of copies that a process of this test has, with its id."""
    found = {}
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(OSError):
            for fd in Path(f"/proc/{process.pid}/fd").iterdir():
                with contextlib.suppress(OSError):
                    if Path(path := os.readlink(fd)).name.startswith("antiphon-host-tier-"):
                        found[Path(path)] = process.pid
    return found


@pytest.mark.cluster
@LINUX
def test_strangers_at_the_experts_doors_are_let_in_nowhere_and_leave_nothing_behind(world: World) -> None:
    (pid,) = _held().values()
    process, stranger = psutil.Process(pid), Identity.parse(new_key())
    ports = [each.laddr.port for each in process.net_connections() if each.status == psutil.CONN_LISTEN]
    assert len(ports) >= len(NAMES)
    num_files, silent = process.num_fds(), []
    for port in ports:
        address = f"127.0.0.1:{port}"
        channels: list[Any] = [
            grpc.insecure_channel(address),
            grpc.secure_channel(address, grpc.ssl_channel_credentials(), options=TARGET_OPTIONS),
            grpc.secure_channel(address, channel_credentials(stranger), options=TARGET_OPTIONS),
        ]
        for channel in channels:
            with channel, pytest.raises(grpc.RpcError) as refused:
                list(channel.stream_stream("/antiphon.rpc.v1.Engine/Session")(iter([b""]), timeout=10.0))
            assert refused.value.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)
        for sent in (
            b"GET / HTTP/1.1\r\n\r\n",
            b"\x16\x03\x01\xff\xff" + os.urandom(4000),
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
            b"",
        ):
            for _ in range(10):
                sock = socket.create_connection(("127.0.0.1", port), 10.0)
                sock.sendall(sent)
                silent.append(sock)
    for expert in NAMES:
        world.ask(expert)  # while they are held open
    for sock in silent:
        sock.close()
    _eventually(lambda: process.num_fds() <= num_files + 4)
    assert list(_held().values()) == [pid]


@pytest.mark.cluster
@LINUX
def test_a_process_that_was_killed_leaves_none_of_its_copies_behind(world: World) -> None:
    """They often lie in memory, and are as large as models are."""

    ((path, pid),) = _held().items()
    assert path.is_dir()
    os.kill(pid, signal.SIGKILL)
    _eventually(lambda: bool(_held()) and pid not in _held().values())
    _eventually(lambda: not path.exists())  # whoever comes next makes its own first, then removes what nobody holds
    _eventually(lambda: len(world.away()) == 1)
    for expert in NAMES:
        _eventually(lambda expert=expert: world.is_answering(expert))  # not another in its place
        world.ask(expert)


def test_experts_that_are_more_than_one_monolith_or_larger_than_the_pool_are_refused(tmp_path: Path) -> None:
    documents = [_deployment(name, tmp_path, replicas=2 if name == "green" else 1) for name in NAMES]
    with pytest.raises(SpecInvalid) as refused:
        serving_of([parse_object(d, "test") for d in [*documents, _composition(residentMemory="50Ki")]], "test")
    said = [f"{problem.path}: {problem.message}" for problem in refused.value.problems]
    assert any("experts[1].deploymentRef" in line and "monolith" in line for line in said)
    assert sum("residentMemory" in line for line in said) == 3
