"""What routing adds to the time to first token, end to end: the same expert asked directly and through coe/<name>, in turn.

    python tests/bench/coe/first_token.py [--requests 200] [--ray] [--embedder lsa|minilm]

Serves three tiny models and a composition over them with ``antiphon serve`` and streams chat answers over HTTP. Without --ray the
gateway decides itself; with it, it asks a router replica over gRPC, as a cluster's gateways do. No prompt is sent twice, so that
no prefix cache helps either side. One JSON line, then a table: medians in milliseconds.
"""

from __future__ import annotations

import argparse
import json
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx

from antiphon.coe.routing.artifact import write_artifact
from antiphon.coe.training.data.example_table import example_table
from antiphon.coe.training.fit import Recipe
from antiphon.coe.training.train import Options, train
from antiphon.testing import write_tiny_llama

START_S = 120.0
WARM_UP = 20


def documents(base: Path, embedder: str) -> Path:
    """Three deployments and a composition in one file."""
    artifact, _ = train(example_table(), Options(recipe=Recipe(num_variants=1), embedder=embedder, slow_path=False), lambda _: None)
    write_artifact(artifact, base / "artifact", {})
    head = "apiVersion: serving.antiphon.dev/v1alpha1\n"
    parts = []
    for i in range(3):
        write_tiny_llama(base / f"model-{i}", seed=i)
        spec = {"model": {"uri": str(base / f"model-{i}")}, "pools": [{"name": "monolith", "role": "monolith"}]}
        spec |= {"endpoint": {"httpPort": 0, "grpcPort": 0}}
        parts.append(f"{head}kind: LLMDeployment\nmetadata: {{name: tiny-{i}}}\nspec: {json.dumps(spec)}\n")
    coe: dict[str, Any] = {
        "general": "model-2",
        "experts": [{"name": f"model-{i}", "deploymentRef": f"tiny-{i}"} for i in range(3)],
        "policy": {"name": "quality"},
        "router": {"slowPath": "never", "timeoutS": 5, "artifact": {"uri": str(base / "artifact")}},
    }
    parts.append(f"{head}kind: CompositionOfExperts\nmetadata: {{name: team}}\nspec: {json.dumps(coe)}\n")
    path = base / "documents.yaml"
    path.write_text("---\n".join(parts))
    return path


def first_token_s(client: httpx.Client, model: str, prompt: str) -> tuple[float, str]:
    """Seconds until the first event with text, and the expert that answered."""
    body = {
        "model": model,
        "messages": [{"role": "user", "content": prompt}],
        "stream": True,
        "max_tokens": 1,
        "temperature": 0,
        "ignore_eos": True,
    }
    began = time.perf_counter()
    with client.stream("POST", "/v1/chat/completions", json=body) as answer:
        answer.raise_for_status()
        took = None
        for line in answer.iter_lines():  # to the end, so that the connection can be used again
            if took is None and line.startswith("data: {"):
                took = time.perf_counter() - began
        if took is None:
            raise SystemExit(f"{model} answered without an event")
        return took, answer.headers.get("x-antiphon-expert", "")


def measure(url: str, num_requests: int) -> dict[str, Any]:
    """Direct and routed requests in turn."""
    direct, routed, experts = [], [], set()
    with httpx.Client(base_url=url, timeout=60, trust_env=False) as client:
        for number in range(WARM_UP + num_requests):
            pair = {
                "tiny-1": f"add the numbers {2 * number} and {number + 7} (case 1-{number % 9})",
                "coe/team": f"add the numbers {2 * number + 1} and {number + 8} (case 1-{number % 9})",
            }
            for model in sorted(pair, reverse=bool(number % 2)):
                took, expert = first_token_s(client, model, pair[model])
                if number >= WARM_UP:
                    (routed if model == "coe/team" else direct).append(took)
                    experts.add(expert)
    return {
        "direct_ms": 1e3 * statistics.median(direct),
        "routed_ms": 1e3 * statistics.median(routed),
        "added_ms": 1e3 * statistics.median(r - d for r, d in zip(routed, direct, strict=True)),
        "routed_p99_ms": 1e3 * statistics.quantiles(routed, n=100)[98],
        "experts": sorted(experts - {""}),
        "requests": num_requests,
    }


def main() -> None:
    """Serve, measure, stop."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--ray", action="store_true")
    parser.add_argument("--embedder", default="lsa", choices=("lsa", "minilm"))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        base = Path(scratch)
        command = [sys.executable, "-m", "antiphon", "serve", "-f", str(documents(base, options.embedder))]
        log = base / "serve.log"
        with log.open("w") as output:
            serving = subprocess.Popen([*command, *([] if options.ray else ["--no-ray"])], stdout=output, stderr=output)
        try:
            deadline = time.monotonic() + START_S
            while "Ctrl-C stops it" not in log.read_text():
                if serving.poll() is not None or time.monotonic() > deadline:
                    raise SystemExit(log.read_text())
                time.sleep(0.2)
            found = re.search(r"HTTP +(http://\S+)/v1", log.read_text())
            assert found is not None
            time.sleep(1.0)  # real time: what starting set in motion is not to be measured
            result = {"decides": "router replica" if options.ray else "gateway", **measure(found[1], options.requests)}
        finally:
            serving.send_signal(signal.SIGINT)
            serving.wait(60)
    print(json.dumps(result))
    for name, value in result.items():
        print(f"{name:>14}  {value:.3f}" if isinstance(value, float) else f"{name:>14}  {value}")


if __name__ == "__main__":
    main()
