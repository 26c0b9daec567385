"""What users say is in no log, process list or environment of a running deployment, also where something fails."""

from __future__ import annotations

import logging
from typing import Any

import httpx
import psutil
import pytest

from .conftest import Target

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(280)]

CANARY = "canary9f31c7"  # in the alphabet of the model's tokenizer


def test_a_canary_sings_in_no_log_and_no_process_list(target: Target, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    url = f"{target.http}/v1/completions"
    body: dict[str, Any] = {"model": "target", "prompt": CANARY, "max_tokens": 4}
    with httpx.Client(trust_env=False, timeout=60) as client:
        statuses = [
            client.post(url, json={**body, **more}).status_code
            for more in (
                {},
                {"stop": [CANARY]},
                {"prompt": CANARY * 2000},
                {"temperature": CANARY},
                {CANARY: 1},
                {"model": "nobody"},
                {"user": CANARY},
                {"model": CANARY},
                {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": CANARY}}}},
            )
        ]
        statuses.append(client.post(url, content=f'{{"prompt": "{CANARY}').status_code)
        with client.stream("POST", url, json={**body, "max_tokens": 400, "stream": True}) as stream:
            next(stream.iter_lines())
    assert statuses[0] == 200
    assert {400, 404} <= set(statuses)
    assert not [record for record in caplog.records if record.name.startswith("antiphon") and CANARY in str(record.__dict__)]
    files = [path for path in target.run_dir.rglob("*") if path.is_file()]
    assert any(path.suffix == ".log" for path in files)
    assert not [path for path in files if CANARY.encode() in path.read_bytes()]
    for process in psutil.Process().children(recursive=True):
        try:
            shown = f"{process.cmdline()} {process.environ()}"
        except psutil.Error:
            continue  # it has ended since
        assert CANARY not in shown
    target.check_unharmed()
