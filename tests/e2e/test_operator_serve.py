"""What the operator renders for a cluster really serves: its serveConfigV2, deployed on local Ray the way ``serve deploy`` does."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from antiphon.core.document.spec import LLMDeployment
from antiphon.core.errors import CheckpointInvalid, DeadlineExceeded
from antiphon.models.loading.source import resolve
from antiphon_operator.render import children
from antiphon_operator.render.ray_cluster import bounds
from antiphon_operator.render.revision import render_revision
from antiphon_operator.render.serve import sizes_of
from antiphon_operator.render.settings import Runtime, Settings

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]

EXAMPLE = Path(__file__).resolve().parents[2] / "deploy" / "examples" / "smollm2-afd.yaml"
SCRIPT = textwrap.dedent("""
    import json, sys, time
    from pathlib import Path
    import httpx
    from antiphon.apps.serve.ray_runtime import RayRuntime

    config, run_dir = json.loads(sys.argv[1]), Path(sys.argv[2])
    (application,) = config["applications"]
    port = application["args"]["document"]["spec"]["endpoint"]["httpPort"]
    groups = {name: 1 for d in application["deployments"] for name in d["ray_actor_options"]["resources"]}
    runtime = RayRuntime(run_dir, num_cpus=4, resources=groups)
    runtime.start()
    runtime.start_serve()
    try:
        from ray.serve.context import _get_global_client
        from ray.serve.schema import ServeDeploySchema

        _get_global_client().deploy_apps(ServeDeploySchema.model_validate(config))

        def until(what, within_s=150):
            deadline = time.monotonic() + within_s
            while not what():
                state = runtime.state(application["name"])
                assert not state.failed and time.monotonic() < deadline, state
                time.sleep(0.2)

        def ready():
            try:
                return httpx.get(f"http://127.0.0.1:{port}/ready", timeout=5).is_success
            except httpx.TransportError:
                return False

        until(lambda: runtime.state(application["name"]).running)
        until(ready)
        body = {"model": "smollm2", "prompt": "The capital of France is", "max_tokens": 3, "temperature": 0}
        print("answer:", httpx.post(f"http://127.0.0.1:{port}/v1/completions", json=body, timeout=60).json()["choices"][0]["text"])
        runtime.delete(application["name"])
    finally:
        runtime.stop()
""")


@pytest.fixture
def config(next_port: Callable[[], int]) -> dict[str, Any]:
    """The rendered configuration; only addresses differ from a cluster's."""
    value = yaml.safe_load(EXAMPLE.read_text())
    try:
        resolve(value["spec"]["model"]["uri"])
    except (CheckpointInvalid, DeadlineExceeded) as error:
        pytest.skip(f"the demo model can't be fetched: {error}")
    document = LLMDeployment.model_validate(value)
    revision = render_revision(document, Settings(runtime=Runtime(image="w:1", ray_version="2.60.0")), None)
    owner = {"apiVersion": document.api_version, "kind": document.kind, "name": document.metadata.name, "uid": "u"}
    service = children.ray_service(document, owner, revision, sizes_of(document), bounds(document), suspend=False)
    rendered: dict[str, Any] = yaml.safe_load(service["spec"]["serveConfigV2"])
    endpoint = {"host": "127.0.0.1", "httpPort": next_port(), "grpcPort": 0}
    rendered["http_options"] |= {"host": "127.0.0.1", "port": next_port()}
    rendered["applications"][0]["args"]["document"]["spec"]["endpoint"] |= endpoint
    return rendered


def test_the_rendered_configuration_answers_a_request(config: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory(prefix="ao-", ignore_cleanup_errors=True) as run_dir:
        command = [sys.executable, "-c", SCRIPT, json.dumps(config), run_dir]
        done = subprocess.run(command, capture_output=True, text=True, timeout=250, check=False)
    assert done.returncode == 0, done.stderr
    assert "answer:  Paris." in done.stdout.splitlines()
