"""The Serve application of a cluster: built from a document alone, with its directory in an actor."""

import json
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from antiphon.core.errors import CheckpointInvalid, DeadlineExceeded
from antiphon.models.loading.source import resolve

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(400)]

EXAMPLE = Path(__file__).resolve().parents[2] / "deploy" / "examples" / "smollm2-afd.yaml"

SCRIPT = textwrap.dedent("""
    import json, sys, time
    from pathlib import Path
    import httpx
    from antiphon.apps.serve.ray_runtime import RayRuntime

    document, run_dir = json.loads(sys.argv[1]), Path(sys.argv[2])
    port = document["spec"]["endpoint"]["httpPort"]
    runtime = RayRuntime(run_dir, num_cpus=4, resources={"pool-attention": 1, "pool-ffn": 1})
    runtime.start()
    runtime.start_serve()

    import ray
    from antiphon.apps.serve.directory_actor import NAMESPACE, ensure_directory
    from antiphon.apps.serve_entry import build
    from antiphon.core.errors import Unavailable
    from antiphon.directory.memory import open_directory
    from antiphon.directory.lease import BlockingDirectory

    def until(what, within_s=150, told=lambda: runtime.state("smollm2")):
        deadline = time.monotonic() + within_s
        while not what():
            assert time.monotonic() < deadline, told()
            time.sleep(0.2)

    def capital():
        body = {"model": "smollm2", "prompt": "The capital of France is", "max_tokens": 3, "temperature": 0}
        return httpx.post(f"http://127.0.0.1:{port}/v1/completions", json=body, timeout=60).json()["choices"][0]["text"]

    runtime.deploy("smollm2", build({"document": document, "drainS": 1}))
    until(lambda: runtime.state("smollm2").running)
    until(lambda: httpx.get(f"http://127.0.0.1:{port}/ready").is_success)
    print("answer:", capital())

    address = ensure_directory("smollm2", lease_s=5.0)
    with BlockingDirectory(open_directory(address)) as directory:
        before = {r.info.worker_id: r.info.epoch for r in directory.workers("smollm2")}
        print("registered:", *sorted(before))
        host = ray.get_actor("directory-smollm2", namespace=NAMESPACE)
        ray.kill(host, no_restart=False)
        print("meanwhile:", capital())

        seen = [None]

        def everybody():
            try:
                seen[:] = [{r.info.worker_id: r.info.epoch for r in directory.workers("smollm2")}]
            except Unavailable as error:
                seen[:] = [str(error)]
            return seen[0] == before

        until(everybody, 90, lambda: (seen, before))
        assert ensure_directory("smollm2", lease_s=5.0) == address
        print("back, with later epochs above:", directory.next_epoch("smollm2/ffn/0") > 1_000_000)
    print("answer:", capital())
    runtime.delete("smollm2")
    runtime.stop()
""")


@pytest.fixture
def document(next_port: Callable[[], int]) -> dict:
    value = yaml.safe_load(EXAMPLE.read_text())
    try:
        resolve(value["spec"]["model"]["uri"])
    except (CheckpointInvalid, DeadlineExceeded) as error:
        pytest.skip(f"the demo model can't be fetched: {error}")
    value["spec"]["endpoint"] = {"httpPort": next_port(), "grpcPort": 0}
    return value


def test_a_document_is_served_and_survives_the_loss_of_its_directory(document: dict) -> None:
    with tempfile.TemporaryDirectory(prefix="ae-", ignore_cleanup_errors=True) as run_dir:
        command = [sys.executable, "-c", SCRIPT, json.dumps(document), run_dir]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith(("answer", "registered", "meanwhile", "back"))]
    assert lines == [
        "answer:  Paris.",
        "registered: smollm2/attention/0 smollm2/ffn/0",
        "meanwhile:  Paris.",
        "back, with later epochs above: True",
        "answer:  Paris.",
    ]
