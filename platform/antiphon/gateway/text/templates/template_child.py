"""The process that renders chat templates: a template that loops or eats memory ends it, and nothing else (request speed).

Reads requests on stdin and answers on stdout, each a length of four bytes and JSON. The kernel ends it when a rendering uses more
processor time or memory than it may. It holds no keys and no connections. Must not know: tokens, or who asks.
"""

from __future__ import annotations

import json
import math
import os
import resource
import struct
import sys
from typing import Any, BinaryIO

from antiphon.core.errors import CheckpointInvalid, InvalidInput
from antiphon.gateway.text.templates.chat_template import ChatTemplate

MAX_MESSAGE_BYTES = 64 * 2**20


def main() -> None:
    """Answer until stdin ends."""
    limits = json.loads(sys.argv[1])
    memory = int(limits["memory_bytes"])
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    source, out = sys.stdin.buffer, sys.stdout.buffer
    templates: dict[str, ChatTemplate] = {}
    while (request := _read(source)) is not None:
        _allow(float(limits["cpu_s"]))
        try:
            answer = _answer(templates, request, int(limits["max_chars"]))
        except MemoryError:
            answer = {"error": "needs more memory than it may", "kind": "limit"}
        _write(out, answer)


def _allow(cpu_s: float) -> None:
    """From now on, so much processor time until the kernel ends this process."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(used.ru_utime + used.ru_stime + cpu_s), hard))


def _answer(templates: dict[str, ChatTemplate], request: dict[str, Any], max_chars: int) -> dict[str, Any]:
    try:
        if request["op"] == "load":
            template = ChatTemplate(request["source"], request["special_tokens"])
            template.compile()
            templates[request["name"]] = template
            return {}
        text = templates[request["name"]].render(
            request["messages"],
            add_generation_prompt=request["add_generation_prompt"],
            variables=request["variables"],
            max_chars=max_chars,
            **request["further"],
        )
    except InvalidInput as error:
        return {"error": str(error)[:2000], "kind": "input"}
    except CheckpointInvalid as error:
        return {"error": str(error)[:2000], "kind": "checkpoint"}
    return {"text": text}


def _read(source: BinaryIO) -> dict[str, Any] | None:
    head = source.read(4)
    if len(head) < 4:
        return None
    (size,) = struct.unpack(">I", head)
    value: dict[str, Any] = json.loads(source.read(size))
    return value


def _write(out: BinaryIO, answer: dict[str, Any]) -> None:
    data = json.dumps(answer).encode()
    out.write(struct.pack(">I", len(data)) + data)
    out.flush()


if __name__ == "__main__":
    os.nice(1)
    main()
