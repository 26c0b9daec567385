"""Two keys of one running deployment: neither reads, goes on with, or is told of what the other has."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterator, Sequence
from typing import Any

import httpx
import pytest

from .conftest import Target, second_gateway

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(280)]

KEYS = {"red": "red-key-of-random-text", "blue": "blue-key-of-random-text"}
ASKED: dict[str, Any] = {"model": "target", "prompt": [5, 6, 7], "max_tokens": 12, "temperature": 0, "ignore_eos": True}


@pytest.fixture(scope="module")
def door(target: Target) -> Iterator[str]:
    """A second gateway of the deployment, which asks for keys."""
    with second_gateway(target, api_keys=frozenset(KEYS.values())) as bound:
        yield f"http://127.0.0.1:{bound.http_port}"


def as_(door: str, tenant: str | None) -> httpx.Client:
    headers = {} if tenant is None else {"authorization": f"Bearer {KEYS.get(tenant, tenant)}"}
    return httpx.Client(base_url=door, headers=headers, trust_env=False, timeout=60.0)


def told(client: httpx.Client, body: dict[str, Any]) -> httpx.Response:
    """A response for who comes again when a queue was full; that there was nobody to answer (503) no tenant may bring about."""
    end_s = time.monotonic() + 60.0
    while (answer := client.post("/v1/responses", json=body)).status_code == 429 and time.monotonic() < end_s:
        time.sleep(float(answer.headers["retry-after"]))
    return answer


def ids_of(answer: httpx.Response) -> list[str]:
    return [line.removeprefix("id: ") for line in answer.text.splitlines() if line.startswith("id: ")]


def said(blocks: Sequence[str]) -> str:
    """The text of a completion's events."""
    told = [block.rpartition("data: ")[2] for block in blocks]
    return "".join(choice["text"] for data in told if data.startswith("{") for choice in json.loads(data)["choices"])


def test_a_stream_is_gone_on_with_by_its_own_key_alone(door: str) -> None:
    chance, body = random.Random(3), {**ASKED, "stream": True}
    with as_(door, "red") as red, as_(door, "blue") as blue:
        whole = red.post("/v1/completions", json=body, headers={"x-request-id": "mine"})
        place = ids_of(whole)[0]
        rest = red.post("/v1/completions", json=body, headers={"x-request-id": "mine", "last-event-id": place})
        assert rest.status_code == 200
        assert said(whole.text.split("\n\n")[1:]) == said(rest.text.split("\n\n"))  # events may be cut otherwise
        for asker, request_id in ((blue, "mine"), (blue, "other"), (red, "other")):
            answer = asker.post("/v1/completions", json=body, headers={"x-request-id": request_id, "last-event-id": place})
            assert answer.status_code == 400, answer.text
        number, _, token = place.partition(".")
        for _ in range(150):
            at = chance.randrange(len(token))
            other = chance.choice("ABCDEFghijk0123-_")
            forged = f"{chance.choice([number, '0', '1', '9' * 30, ''])}.{token[:at]}{other}{token[at + 1 :]}"
            headers = {"x-request-id": "mine", "last-event-id": forged}
            assert blue.post("/v1/completions", json=body, headers=headers).status_code == 400, forged


def test_cached_tokens_tell_nobody_what_another_key_has_asked(door: str) -> None:
    """Guesses at another's prompt, as it is and under salts that could be its own (CVE-2025-46570)."""
    secret = [7 + number * 5 % 300 for number in range(96)]  # six blocks

    def cached(client: httpx.Client, prompt: list[int], **more: Any) -> int:
        body = {"model": "target", "prompt": prompt, "max_tokens": 1, "temperature": 0, **more}
        answer = client.post("/v1/completions", json=body)
        assert answer.status_code == 200, answer.text
        return int((answer.json()["usage"].get("prompt_tokens_details") or {}).get("cached_tokens") or 0)

    with as_(door, "red") as red, as_(door, "blue") as blue:
        assert cached(red, secret) == 0
        assert cached(red, secret) >= 64, "a key's own prompts are cached, or nothing is shown here"
        for salt in ("", "red", KEYS["red"], "red-key", "\0", "0" * 32):
            assert cached(blue, secret, **({"cache_salt": salt} if salt else {})) == 0, salt
        assert cached(blue, secret) >= 64, "blue's own by now"


def test_stored_responses_are_their_keys_own(door: str) -> None:
    chance = random.Random(4)
    body = {"model": ASKED["model"], "input": "a secret", "max_output_tokens": 2}
    with as_(door, "red") as red, as_(door, "blue") as blue:
        kept = told(red, body).json()["id"]
        assert red.get(f"/v1/responses/{kept}").status_code == 200
        assert blue.get(f"/v1/responses/{kept}").status_code == 404
        known = "".join(chance.choice("0123456789abcdef") for _ in range(32))
        for name in (kept, kept.upper(), f"{kept}%00", f"resp_{known}", "", "a" * 4000):
            asked = {**body, "previous_response_id": name}
            assert told(blue, asked).status_code == 400, name
        assert told(red, {**body, "previous_response_id": kept}).status_code == 200


def test_who_has_no_key_is_refused_everywhere_and_names_nothing_in_the_metrics(door: str) -> None:
    chance = random.Random(5)
    with as_(door, None) as nobody:
        for _ in range(100):
            key = chance.choice(["", "x", "Bearer", "é" * 40, KEYS["red"][:-1], KEYS["red"].upper(), "own-" + "0" * 64])
            headers = {b"authorization": f"{chance.choice(['Bearer', 'bearer', 'Basic', 'x'])} {key}".strip().encode()}
            path = chance.choice(["/v1/completions", "/v1/responses", "/v1/messages", "/tokenize", "/v1/embeddings", "/v1/score"])
            answer = nobody.post(path, json=ASKED, headers=headers)
            assert answer.status_code == 401, (path, key, answer.text)
            shown = nobody.get(chance.choice(["/v1/models", "/status", "/usage", "/experts"]), headers=headers)
            assert shown.status_code == 401, shown.text
        metrics = nobody.get("/metrics").text
        assert not [line for line in metrics.splitlines() if "tenant=" in line and ("é" in line or "own-" in line)]
