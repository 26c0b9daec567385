"""An API key that expires, is exchanged or taken back while its stream runs, and between the answers of a conversation."""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from antiphon.apps.serve.deployment_set import Serving
from antiphon.apps.serve.gateway_app import GatewayThread, serving_config
from antiphon.gateway.access.key_lines import key_line
from attack.conftest import Target

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(280)]

OLD, NEW, OTHER = "old-key-of-random-text", "new-key-of-random-text", "key-of-others-random-text"
STREAM: dict[str, Any] = {
    "model": "target",
    "prompt": [5, 6, 7],
    "max_tokens": 300,
    "temperature": 0,
    "ignore_eos": True,
    "stream": True,
}
ANSWER: dict[str, Any] = {"model": "target", "input": "a secret", "max_output_tokens": 2}


class Keyed:
    """A second gateway of the deployment, and its file of keys."""

    def __init__(self, target: Target, file: Path) -> None:
        self._file = file
        self.write(lambda: "")
        config = serving_config(Serving.alone(target.document, str(target.checkpoint)), drain_s=1.0)
        self.gateway = GatewayThread(replace(config, api_keys_file=file), target.deployment.directory_address)
        self.url = f"http://127.0.0.1:{self.gateway.wait_open(60.0).http_port}"

    def write(self, ours: Callable[[], str]) -> None:
        """The keys of the two tenants from now on; of one of them the line may end otherwise."""
        self._file.write_text(f"{key_line('team', 'user', OLD)}{ours()}\n{key_line('others', 'user', OTHER)}\n")
        self._file.chmod(0o600)

    def replace(self, key: str | None) -> None:
        """The team's only key; None = it has none."""
        line = "" if key is None else f"{key_line('team', 'user', key)}\n"
        self._file.write_text(f"{line}{key_line('others', 'user', OTHER)}\n")

    def as_(self, key: str) -> httpx.Client:
        return httpx.Client(base_url=self.url, headers={"authorization": f"Bearer {key}"}, trust_env=False, timeout=60.0)


@pytest.fixture
def door(target: Target, tmp_path: Path) -> Iterator[Keyed]:
    made = Keyed(target, tmp_path / "keys")
    try:
        with made.as_(OLD) as client:
            while client.get("/ready").status_code != 200:
                made.gateway.check()
        yield made
    finally:
        made.gateway.close()
    target.check_unharmed()


def until_refused(client: httpx.Client) -> None:
    end_s = time.monotonic() + 30.0
    while client.get("/v1/models").status_code != 401:
        assert time.monotonic() < end_s, "the key is still taken"
        time.sleep(0.05)


def ids_of(lines: list[str]) -> list[str]:
    return [line.removeprefix("id: ") for line in lines if line.startswith("id: ")]


def end(door: Keyed, how: str) -> None:
    """The old key's time is over."""
    if how == "expires":
        now = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=1)
        door.write(lambda: f" expires={now:%Y-%m-%dT%H:%M:%SZ}")
    else:
        door.replace(NEW if how == "is exchanged" else None)


@pytest.mark.parametrize("how", ["expires", "is exchanged", "is taken back"])
def test_a_key_whose_time_is_over_begins_nothing_and_goes_on_with_nothing(door: Keyed, how: str) -> None:
    """The stream that it began goes on; neither the rest of a stream nor a kept answer is had with it any more."""
    with door.as_(OLD) as old, door.as_(NEW) as new, door.as_(OTHER) as other:
        kept = old.post("/v1/responses", json=ANSWER).json()["id"]
        named = {"x-request-id": "mine"}
        with old.stream("POST", "/v1/completions", json=STREAM, headers=named) as answer:
            read = answer.iter_lines()
            lines = [next(read) for _ in range(6)]
            end(door, how)
            until_refused(old)
            lines += list(read)
        assert "data: [DONE]" in lines
        place = {**named, "last-event-id": ids_of(lines)[0]}
        more = {**ANSWER, "previous_response_id": kept}
        asked: list[tuple[str, str, Any, dict[str, str]]] = [
            ("POST", "/v1/completions", STREAM, place),
            ("POST", "/v1/responses", more, {}),
            ("GET", f"/v1/responses/{kept}", None, {}),
            ("DELETE", f"/v1/responses/{kept}", None, {}),
        ]
        for method, path, body, headers in asked:
            assert old.request(method, path, json=body, headers=headers).status_code == 401, (method, path)
            assert other.request(method, path, json=body, headers=headers).status_code in (400, 404), (method, path)
        if how != "is exchanged":
            assert new.get("/v1/models").status_code == 401
            door.replace(NEW)
        end_s = time.monotonic() + 30.0
        while new.get("/v1/models").status_code != 200:
            assert time.monotonic() < end_s
            time.sleep(0.05)
        # What a tenant has is the tenant's, whichever key it has today.
        assert new.get(f"/v1/responses/{kept}").status_code == 200
        assert new.post("/v1/responses", json=more).status_code == 200
        rest = new.post("/v1/completions", json=STREAM, headers=place)
        assert rest.status_code == 200
        assert rest.text.rstrip().endswith("[DONE]")


def test_a_file_of_keys_that_is_gone_empty_or_wrong_lets_nobody_in_who_was_not(door: Keyed, tmp_path: Path) -> None:
    with door.as_(OLD) as old, door.as_("guessed") as nobody:
        for text in (
            None,
            "",
            "team user\n",
            "x" * (5 << 20),
        ):
            if text is None:
                (tmp_path / "keys").unlink()
            else:
                (tmp_path / "keys").write_text(text)
            end_s = time.monotonic() + 2.5  # real time: two looks at the file
            while time.monotonic() < end_s:
                assert nobody.get("/v1/models").status_code == 401, text
                assert old.get("/v1/models").status_code in (200, 401)
                time.sleep(0.2)
