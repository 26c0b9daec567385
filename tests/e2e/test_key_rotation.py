"""The deployment's key is changed under load, step by step, while its workers are killed: no stream is lost, whatever its links."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]

TESTS = Path(__file__).parents[1]

# In a process of its own: its key is another than that of the tests beside it.
ROTATED = """
import json, os, pathlib, signal, socket, sys, threading, time
from antiphon.core.identity import Identity, adopt_file, new_key

base = pathlib.Path(sys.argv[1])
key = base / "key"
old, new = new_key(), new_key()
key.write_text(old)
adopt_file(key)

import grpc, httpx
from antiphon.core.errors import AntiphonError
from antiphon.core.ids import Role
from antiphon.rpc.credentials import TARGET_OPTIONS, channel_credentials
from antiphon.transport.connect.proof import connect_proven
from attack.conftest import Target

target = Target(base)
body = {"model": "target", "prompt": list(range(5, 60)), "max_tokens": 300, "temperature": 0, "ignore_eos": True, "stream": True}
ends, wrong, texts = threading.Event(), [], []

def streams():
    with httpx.Client(base_url=target.http, trust_env=False, timeout=120) as client:
        while not ends.is_set():
            text, last = "", ""
            with client.stream("POST", "/v1/completions", json=body) as answer:
                for line in answer.iter_lines():
                    if line.startswith("data: {"):
                        event = json.loads(line[6:])
                        if "error" in event:
                            wrong.append(event)
                            break
                        for choice in event["choices"]:
                            text, last = text + choice["text"], choice["finish_reason"] or last
            if answer.status_code == 503:  # who comes while the only worker of a role starts again is told to come later
                time.sleep(0.2)
                continue
            if answer.status_code != 200 or last != "length":
                wrong.append([answer.status_code, last])
            texts.append(text)

def eventually(check, within_s=60.0):
    end = time.monotonic() + within_s
    while not check():
        assert time.monotonic() < end, "it did not come back"
        time.sleep(0.05)

def opens(identity):
    # Which doors open for who has this key.
    found = {}
    for role, info in target._workers().items():
        for each in info.endpoint.data.split(","):
            scheme, _, address = each.partition("://")
            if scheme not in ("shm", "nixl"):
                continue
            if scheme == "shm":
                sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
                sock.settimeout(10.0)
                sock.connect(address if address.startswith("/") else "\\0" + address)
            else:
                host, _, port = address.rpartition(":")
                sock = socket.create_connection((host, int(port)), 10.0)
            with sock:
                try:
                    connect_proven(sock, address, time.monotonic() + 10.0, identity)
                    found[f"{role.value} {scheme}"] = True
                except AntiphonError:
                    found[f"{role.value} {scheme}"] = False
    addresses = {f"{role.value} rpc": info.endpoint.rpc for role, info in target._workers().items()}
    addresses["directory rpc"] = target.deployment.directory_address.removeprefix("grpc://")
    for name, address in addresses.items():
        with grpc.secure_channel(address, channel_credentials(identity), options=TARGET_OPTIONS) as channel:
            try:
                channel.unary_unary("/grpc.health.v1.Health/Check")(b"", timeout=10.0)
                found[name] = True
            except grpc.RpcError as error:
                found[name] = error.code() is grpc.StatusCode.UNIMPLEMENTED  # the directory tells of no health
    return found

try:
    readers = [threading.Thread(target=streams) for _ in range(4)]
    for reader in readers:
        reader.start()
    eventually(lambda: len(texts) >= 4)
    for lines, role in ((f"{old}\\n{new}", Role.FFN), (f"{new}\\n{old}", Role.PREFILL), (new, Role.FFN), (new, Role.ATTENTION)):
        fresh = base / "key.new"
        fresh.write_text(lines)
        fresh.replace(key)
        time.sleep(2.5)  # parts look every second
        before = target._workers()[role]
        os.kill(before.pid, signal.SIGKILL)
        eventually(lambda: (now := target._workers().get(role)) is not None and now.epoch > before.epoch and now.ready)
        had = len(texts)
        eventually(lambda: len(texts) >= had + 4)
    ends.set()
    for reader in readers:
        reader.join(120)
    print(json.dumps({"wrong": wrong, "texts": len(texts), "different": len(set(texts)),
                      "old": opens(Identity.parse(old)), "new": opens(Identity.parse(new))}))
finally:
    ends.set()
    target.close()
"""


def test_no_stream_is_lost_and_the_old_key_opens_nothing_any_more(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("ANTIPHON_KEY")}
    environment["PYTHONPATH"] = os.pathsep.join([str(TESTS), *sys.path])
    command = [sys.executable, "-c", ROTATED, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["wrong"] == []
    assert found["texts"] > 16
    assert found["different"] == 1, "a token changed"
    assert found["old"].keys() == found["new"].keys() >= {"directory rpc", "attention rpc", "ffn rpc", "prefill rpc", "ffn shm"}
    assert not any(found["old"].values()), found["old"]
    assert all(found["new"].values()), found["new"]
