"""What refusing expensive schemas costs the streams beside them: a JSON line per figure, as ratios within one run.

    python tests/bench/structure/refusals.py http://127.0.0.1:8000 MODEL [--rounds 6] [--tokens 120] [--streams 2]

Rounds alternate: streams alone, and the same streams beside a process that sends one expensive schema after the other (each new, so
that none is known; bodies are made beforehand). Told: the gaps between events with and without, their ratio, and how long refusals
took. The streams are read by a process of their own, which makes nothing else; both share the machine with the server.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import threading
import time
from multiprocessing.connection import Connection
from typing import Any

import httpx


def costly(number: int) -> list[dict[str, Any]]:
    """Bodies' schemas; ``number`` makes them new."""
    return [
        {"allOf": [{"type": "string", "pattern": f"a.{{{i}}}b{number}.*c{{{i * 3}}}"} for i in range(1, 30)]},
        {"type": "integer", "multipleOf": 999_983 + number},
        {"enum": [f"value{number}-{i * 7919}" for i in range(100_000)]},
        {"anyOf": [{"properties": {f"k{number}{i}": {}}, "required": [f"k{number}{i}"], "type": "object"} for i in range(3000)]},
        {"type": "object", "properties": {f"k{number}_{i}": {"type": "string"} for i in range(5000)}},
        {"allOf": [{"type": "string", "pattern": f"a{number}{i}"} for i in range(1000)]},
    ]


def attack(url: str, model: str, rounds: int, pipe: Connection) -> None:
    """Send while told to; answer with seconds and statuses of each round."""
    bodies = [
        json.dumps(
            {
                "model": model,
                "messages": [{"role": "user", "content": "what?"}],
                "max_tokens": 8,
                "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}},
            }
        ).encode()
        for number in range(8)
        for schema in costly(os.getpid() * 100 + number)
    ]
    headers = {"content-type": "application/json"}
    at = 0
    with httpx.Client(base_url=url, timeout=60) as http:
        pipe.send("ready")
        for _ in range(rounds):
            pipe.recv()
            took: list[tuple[float, int, Any]] = []
            while not pipe.poll():
                begun_s = time.perf_counter()
                answer = http.post("/v1/chat/completions", content=bodies[at % len(bodies)], headers=headers)
                took.append((time.perf_counter() - begun_s, answer.status_code, answer.json().get("error", {}).get("param")))
                at += 1
            pipe.recv()
            pipe.send(took)


def stream(url: str, model: str, num_tokens: int, gaps: list[float]) -> None:
    """One stream's gaps; the first two belong to its beginning."""
    body = {
        "model": model,
        "messages": [{"role": "user", "content": "Tell a long story."}],
        "max_tokens": num_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
    }
    found, last_s = [], 0.0
    with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=300) as answer:
        for line in answer.iter_lines():
            if line.startswith("data: {"):
                now_s = time.perf_counter()
                found.append(now_s - last_s)
                last_s = now_s
    gaps += found[3:]


def streams(url: str, model: str, num_tokens: int, count: int) -> list[float]:
    """Gaps of streams at once."""
    gaps: list[float] = []
    threads = [threading.Thread(target=stream, args=(url, model, num_tokens, gaps)) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return gaps


def at(values: list[float], share: float) -> float:
    """A quantile, in milliseconds."""
    return sorted(values)[int(share * (len(values) - 1))] * 1e3


def main() -> None:
    """Alternate and tell."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url")
    parser.add_argument("model")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--tokens", type=int, default=120)
    parser.add_argument("--streams", type=int, default=2)
    args = parser.parse_args()
    pipe, other = multiprocessing.Pipe()
    attacker = multiprocessing.get_context("spawn").Process(
        target=attack, args=(args.url, args.model, args.rounds, other), daemon=True
    )
    attacker.start()
    pipe.recv()
    streams(args.url, args.model, 16, args.streams)
    alone: list[list[float]] = []
    beside: list[list[float]] = []
    took: list[tuple[float, int, Any]] = []
    for _ in range(args.rounds):
        alone.append(streams(args.url, args.model, args.tokens, args.streams))
        pipe.send("begin")
        beside.append(streams(args.url, args.model, args.tokens, args.streams))
        pipe.send("end")
        took += pipe.recv()
    attacker.join(10)
    run = {"rounds": args.rounds, "streams": args.streams, "tokens": args.tokens, "cpus": os.cpu_count()}
    for name, share in (("p50", 0.5), ("p99", 0.99), ("max", 1.0)):
        ratios = [at(b, share) / at(a, share) for a, b in zip(alone, beside, strict=True)]
        print(
            json.dumps(
                {
                    "figure": f"gap {name} of streams beside refusals / alone",
                    "ratio": round(statistics.median(ratios), 2),
                    "rounds_ratio": [round(r, 2) for r in ratios],
                    "alone_ms": round(at([g for a in alone for g in a], share), 2),
                    "beside_ms": round(at([g for b in beside for g in b], share), 2),
                    **run,
                }
            )
        )
    seconds = [each[0] for each in took]
    statuses = sorted({(status, str(param)) for _, status, param in took})
    print(
        json.dumps(
            {
                "figure": "refusals",
                "count": len(took),
                "median_s": round(statistics.median(seconds), 3),
                "max_s": round(max(seconds), 3),
                "answers": statuses,
                **run,
            }
        )
    )


if __name__ == "__main__":
    main()
