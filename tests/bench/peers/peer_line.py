"""The line between the peers' runner and a system under measurement: one JSON object a line in, one out (control speed).

    {"do": "facts"}                                                            → {"version": ..., further facts}
    {"do": "decode", "batch": 8, "num_prompt": 128, "num_generated": 128}      → {"tokens_per_s": ..., "step_s": ...}
    {"do": "prefill", "num_prompt": 1024}                                      → {"tokens_per_s": ..., "ttft_s": ...}
    {"do": "stop"}                                                             → the process ends

What decode states is the window in which every request of the batch decodes: from the moment the last of them has its first token
to the moment the first of them has its last. Standard library only, since peers run in environments that have nothing of ours.
Must not know: any system.
"""

from __future__ import annotations

import json
import os
import random
import sys
import traceback
from typing import Any, Protocol

TEXT_CHUNK = 64  # tokens of a text that are computed together: logits of more would be most of what is held


class Measured(Protocol):
    """A system that has its model loaded."""

    def facts(self) -> dict[str, Any]:
        """At least its version."""
        ...

    def decode(self, batch: int, num_prompt: int, num_generated: int) -> dict[str, Any]:
        """Steady greedy decode of ``batch`` requests at once; warms up by itself."""
        ...

    def prefill(self, num_prompt: int) -> dict[str, Any]:
        """From one prompt to its first token, once."""
        ...


def keep_stdout() -> int:
    """A private descriptor of stdout; what libraries print goes to stderr from now on."""
    private = os.dup(1)
    os.dup2(2, 1)
    return private


def answer(system: Measured, private: int) -> None:
    """Measure what stdin asks for until it ends; an error is an answer too."""
    with os.fdopen(private, "w", buffering=1) as out:
        out.write(json.dumps({"ready": True, **system.facts()}) + "\n")
        for text in sys.stdin:
            asked = json.loads(text)
            what = asked.pop("do")
            if what == "stop":
                return
            try:
                said = {"decode": system.decode, "prefill": system.prefill, "facts": system.facts}[what](**asked)
            except Exception as error:  # noqa: BLE001  # the runner prints it and goes on
                traceback.print_exc()
                said = {"error": f"{type(error).__name__}: {error}"}
            out.write(json.dumps(said) + "\n")


def resident() -> dict[str, int]:
    """What this process holds in memory now: all of it, and without mapped files."""
    with open("/proc/self/status", encoding="ascii") as status:
        fields = dict(line.split(":", 1) for line in status if ":" in line)
    kinds = {"resident_bytes": "VmRSS", "anonymous_bytes": "RssAnon"}
    return {name: int(fields[field].split()[0]) * 1024 for name, field in kinds.items()}


def prompts(batch: int, num_prompt: int, seed: int = 0) -> list[list[int]]:
    """Prompts that share no prefix; ids that every model has."""
    chance = random.Random(seed)
    return [[chance.randrange(10, 200) for _ in range(num_prompt)] for _ in range(batch)]


def decode_figures(batch: int, num_tokens: int, seconds: float) -> dict[str, Any]:
    """The answer to decode."""
    rate = num_tokens / seconds
    return {"tokens_per_s": rate, "step_s": batch / rate}
