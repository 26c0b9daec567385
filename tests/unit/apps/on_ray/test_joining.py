"""Which Ray is joined, and what is said of it, without one."""

import json
import os
import socket
import stat
from pathlib import Path

import pytest

from antiphon.apps.on_ray.joining import JoinedNode, address_from, options_for
from antiphon.core.errors import InvalidInput

NODE = JoinedNode(address="127.0.0.1", num_other_nodes=0, num_free_cpus=4.0)


@pytest.mark.parametrize("value", [None, "", "local"])
def test_without_an_address_a_ray_of_its_own_is_started(value: str | None) -> None:
    assert address_from(None, {} if value is None else {"RAY_ADDRESS": value}) is None


def test_the_option_goes_before_the_variable() -> None:
    with socket.socket() as head:
        head.bind(("127.0.0.1", 0))
        head.listen()
        address = f"127.0.0.1:{head.getsockname()[1]}"
        assert address_from(address, {"RAY_ADDRESS": "auto"}) == address
        assert address_from(None, {"RAY_ADDRESS": "auto"}) == "auto"


@pytest.mark.parametrize(
    ("address", "why"),
    [
        ("ray://127.0.0.1:10001", "client protocol"),
        ("127.0.0.1", "no address"),
        ("127.0.0.1:port", "no address"),
        ("127.0.0.1:70000", "no address"),
        (":6379", "no address"),
        ("127.0.0.1:1", "no Ray at"),
    ],
)
def test_what_is_no_head_is_refused_by_the_name_it_came_under(address: str, why: str) -> None:
    with pytest.raises(InvalidInput, match=f"^--ray-address: .*{why}"):
        address_from(address, {})
    with pytest.raises(InvalidInput, match=f"^RAY_ADDRESS: .*{why}"):
        address_from(None, {"RAY_ADDRESS": address})


def test_what_differs_from_a_ray_of_its_own_is_said() -> None:
    assert len(NODE.warnings()) == 1
    beyond = JoinedNode(address="10.0.0.7", num_other_nodes=2, num_free_cpus=4.0).warnings()
    assert any("2 other node(s)" in text for text in beyond)
    assert any("listen on 10.0.0.7 and beyond" in text for text in beyond)


def test_the_environment_goes_by_a_file_of_this_user_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ANTIPHON_SECRET", "canary")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "another's")
    options = options_for(NODE, tmp_path)
    assert "canary" not in json.dumps(options)  # Ray shows a replica's options to everybody who may look
    (path,) = (Path(value) for value in options["runtime_env"]["env_vars"].values() if value.startswith(str(tmp_path)))
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    given = json.loads(path.read_text())
    assert given["ANTIPHON_SECRET"] == "canary"
    assert "RAY_AUTH_TOKEN" not in given
    assert given["PATH"] == os.environ["PATH"]
    assert options["resources"] == {"node:127.0.0.1": pytest.approx(0.001)}
