"""What users say is in no log, process list or environment of a running deployment at level DEBUG, also where something fails."""

from __future__ import annotations

import contextlib
import logging
import threading
from typing import Any

import grpc
import httpx
import psutil
import pytest

from antiphon.rpc.v1 import inference_pb2 as pb

from .conftest import Target

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(280)]

CANARY = "canary9f31c7"  # in the alphabet of the model's tokenizer
SAID = [{"role": "user", "content": CANARY}]
SCHEMA = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": CANARY}}}
TOOL = {"type": "function", "function": {"name": CANARY, "parameters": {"type": "object"}}}
# What every door is asked, rightly and wrongly.
ASKED: dict[str, list[dict[str, Any]]] = {
    "/v1/completions": [
        {"prompt": CANARY},
        {"prompt": CANARY, "stop": [CANARY]},
        {"prompt": CANARY * 2000},
        {"prompt": CANARY, "temperature": CANARY},
        {"prompt": CANARY, CANARY: 1},
        {"prompt": CANARY, "user": CANARY},
        {"prompt": CANARY, "model": CANARY},
        {"prompt": CANARY, "response_format": SCHEMA},
        {"prompt": CANARY, "suffix": CANARY},
    ],
    "/v1/chat/completions": [
        {"messages": SAID},
        {"messages": [{"role": CANARY, "content": CANARY}]},
        {"messages": SAID, "tools": [TOOL]},
        {"messages": SAID, "tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": CANARY + CANARY}}},
        {"messages": SAID, "chat_template_kwargs": {CANARY: [CANARY]}},
        {"messages": SAID, "structured_outputs": {"regex": f"({CANARY}"}},
        {"messages": SAID, "structured_outputs": {"grammar": f"root ::= {CANARY}"}},
    ],
    "/v1/responses": [{"input": CANARY, "instructions": CANARY}, {"input": CANARY, "previous_response_id": CANARY}],
    "/v1/responses/input_tokens": [{"input": CANARY}],
    "/v1/messages": [{"messages": SAID, "system": CANARY}, {"messages": SAID, "system": 1}],
    "/v1/messages/count_tokens": [{"messages": SAID}, {"messages": SAID, "tools": [{"name": CANARY}]}],
    "/tokenize": [{"prompt": CANARY}, {"messages": SAID}, {"prompt": CANARY, "messages": SAID}],
    "/detokenize": [{"tokens": [CANARY]}],
    "/v1/embeddings": [{"input": CANARY}],
    "/v1/rerank": [{"query": CANARY, "documents": [CANARY]}],
}


def test_a_canary_sings_in_no_log_and_no_process_list(target: Target, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)  # of every logger, libraries' too
    statuses = {path: set[int]() for path in ASKED}
    with httpx.Client(base_url=target.http, trust_env=False, timeout=60) as client:
        for path, bodies in ASKED.items():
            for body in bodies:
                for more in ({}, {"stream": True}):
                    asked = {"model": "target", "max_tokens": 4, **body, **more}
                    statuses[path].add(client.post(path, json=asked).status_code)
            for half in (f'{{"model": "target", "{CANARY}', f'{{"model": "target", "prompt": "{CANARY}", "prompt": "{CANARY}"}}'):
                statuses[path].add(client.post(path, content=half, headers={"content-type": "application/json"}).status_code)
        left = {"model": "target", "prompt": CANARY, "max_tokens": 400, "stream": True}
        with client.stream("POST", "/v1/completions", json=left) as stream:
            next(stream.iter_lines())
        metrics = client.get("/metrics").text
    assert not {path for path, seen in statuses.items() if not seen <= {200, 400, 404, 422}}, statuses
    assert {path for path, seen in statuses.items() if 200 not in seen} == {"/detokenize", "/v1/embeddings", "/v1/rerank"}, statuses
    by_grpc(target)
    assert CANARY not in metrics
    # What the test's own clients say of themselves does not count: they are in this thread.
    records = [record for record in caplog.records if record.thread != threading.get_ident()]
    assert records
    assert not [record for record in records if CANARY in f"{record.getMessage()} {record.__dict__}"]
    files = [path for path in target.run_dir.rglob("*") if path.is_file()]
    assert any(path.suffix == ".log" for path in files)
    assert not [path for path in files if CANARY.encode() in path.read_bytes()]
    for process in psutil.Process().children(recursive=True):
        try:
            shown = f"{process.cmdline()} {process.environ()} {process.name()}"
        except psutil.Error:
            continue  # it has ended since
        assert CANARY not in shown
    target.check_unharmed()


def by_grpc(target: Target) -> None:
    """The same by the other door."""
    asked = [
        pb.GenerateRequest(model="target", prompt=CANARY),
        pb.GenerateRequest(model=CANARY, prompt=CANARY),
        pb.GenerateRequest(model="target", prompt=CANARY, stop=[CANARY] * 99),
        pb.GenerateRequest(model="target", prompt=CANARY * 2000),
    ]
    channel: Any = grpc.insecure_channel(target.grpc)  # of raw bytes, which the stubs do not know
    with channel:
        for request in asked:
            request.sampling.max_tokens = 4
            with contextlib.suppress(grpc.RpcError):
                list(channel.unary_stream("/antiphon.rpc.v1.Inference/Generate")(request.SerializeToString(), timeout=30.0))
        for method, vector in (
            ("Embed", pb.EmbedRequest(model="target", texts=[CANARY])),
            ("Score", pb.ScoreRequest(model="target", query=CANARY, documents=[CANARY])),
        ):
            with contextlib.suppress(grpc.RpcError):
                channel.unary_unary(f"/antiphon.rpc.v1.Inference/{method}")(vector.SerializeToString(), timeout=30.0)
