"""What moving experts while serving costs: gaps between tokens with moves and without, interleaved, over real processes.

    python tests/bench/moe/moves.py [--checkpoint DIR] [--streams 8] [--tokens 128] [--rounds 3] [--dtype bfloat16]

1A2F (two groups of experts, threads and all on the machine's processors). Each round talks twice: once undisturbed, once while
placements follow each other as fast as they are brought in, with redundant copies coming and going. A step at rest is the median
gap; the largest gap of the disturbed half is what a user waits at most, and ``pause_steps`` says by how many steps at rest that is
more than the largest gap of the undisturbed half, which is noise. In float32 texts must be equal; in bfloat16 a move changes which
partial sums of a row are rounded, and the share of equal texts is said. One JSON line per half, then the medians.
Without --checkpoint a seeded random Qwen3-MoE of about 160M parameters is written first (bf16).
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import statistics
import tempfile
import threading
import time
from pathlib import Path

import httpx

from antiphon.apps.serve.local import DirectDeployment, running, wait_ready
from antiphon.core.document.spec import LLMDeployment
from antiphon.models.config import DecoderConfig
from antiphon.models.experts.placement import ExpertPlacement
from antiphon.models.families import describe
from antiphon.rpc.experts import ExpertsCalls, RebalanceWish
from antiphon.testing import write_tiny_moe

MOE = {
    "hidden_size": 512,
    "intermediate_size": 1024,
    "moe_intermediate_size": 256,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "num_experts": 32,
    "num_experts_per_tok": 4,
    "norm_topk_prob": True,
    "vocab_size": 384,
    "max_position_embeddings": 2048,
}


def write_model(path: Path) -> Path:
    """The tiny mixture's tokenizer beside the weights of a larger one."""
    import torch
    import transformers as hf

    write_tiny_moe(path)
    torch.manual_seed(0)
    model = hf.Qwen3MoeForCausalLM(hf.Qwen3MoeConfig(**MOE)).to(torch.bfloat16)
    model.save_pretrained(path)
    return path


class Talk:
    """Streams at once; gaps between their tokens in seconds, and the texts."""

    def __init__(self, url: str, num_streams: int, num_tokens: int) -> None:
        self.gaps_s: list[float] = []
        self.texts: dict[int, str] = {}
        self._url, self._num_tokens = url, num_tokens
        self.threads = [threading.Thread(target=self._run, args=(i,)) for i in range(num_streams)]

    def run(self) -> None:
        """Start all, wait for all."""
        for thread in self.threads:
            thread.start()
        for thread in self.threads:
            thread.join()

    def _run(self, index: int) -> None:
        body = {
            "model": "moe",
            "prompt": f"{index} one ring to bring them all ",
            "max_tokens": self._num_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
        }
        parts, last_s = [], None
        with httpx.stream("POST", f"{self._url}/v1/completions", json=body, timeout=120) as response:
            for line in response.iter_lines():
                if not line.startswith("data: {"):
                    continue
                now_s = time.perf_counter()
                parts.append("".join(choice["text"] for choice in json.loads(line[6:])["choices"]))
                if last_s is not None:
                    self.gaps_s.append(now_s - last_s)
                last_s = now_s
        self.texts[index] = "".join(parts)


def placements(config: DecoderConfig, seed: int) -> ExpertPlacement:
    """Another placement with copies for every seed."""
    chance = random.Random(seed)
    rows = {n: [chance.random() ** 4 for _ in range(config.num_experts)] for n in range(len(config.ffns))}
    return ExpertPlacement.balanced(config, rows, 2, num_redundant=4 * (seed % 3))


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as base:
        path = options.checkpoint or write_model(Path(base) / "model")
        config = describe(json.loads((path / "config.json").read_text()))
        document = LLMDeployment.model_validate(
            {
                "apiVersion": "serving.antiphon.dev/v1alpha1",
                "kind": "LLMDeployment",
                "metadata": {"name": "moe"},
                "spec": {
                    "model": {"uri": str(path), "dtype": options.dtype},
                    "topology": "afd",
                    "pools": [
                        {"name": "attention", "role": "attention"},
                        {"name": "ffn", "role": "ffn", "replicas": 2, "parallelism": {"expert": 2}},
                    ],
                    "cache": {"numBlocks": 1024},
                    "endpoint": {"httpPort": 0, "grpcPort": 0},
                },
            }
        )
        run_dir = Path(base) / "run"
        run_dir.mkdir()
        deployment = DirectDeployment(document, checkpoint=str(path), run_dir=run_dir)
        deployment.start()
        try:
            wait_ready(deployment, 180)
            ports = running(run_dir).ports
            assert ports is not None
            measure(config, f"http://127.0.0.1:{ports.http_port}", f"127.0.0.1:{ports.grpc_port}", options)
        finally:
            deployment.close()


def measure(config: DecoderConfig, url: str, grpc: str, options: argparse.Namespace) -> None:
    """Talk in turns, undisturbed and disturbed."""
    calls = ExpertsCalls(grpc)
    Talk(url, options.streams, 16).run()
    # Made beforehand: the thread that made them would keep those that take the time from running.
    wishes = itertools.cycle([RebalanceWish(placement_json=placements(config, seed).to_json(config)) for seed in range(1, 61)])
    found = {"undisturbed": [], "moving": []}
    for number in range(options.rounds):
        texts: dict[str, dict[int, str]] = {}
        for name in ("undisturbed", "moving"):
            talk, stop, num_moves = Talk(url, options.streams, options.tokens), threading.Event(), 0
            runner = threading.Thread(target=lambda talk=talk, stop=stop: (talk.run(), stop.set()))
            start_s = time.perf_counter()
            runner.start()
            before = calls.expert_load().placement_number
            while name == "moving" and not stop.is_set():
                calls.rebalance(next(wishes))
                while not stop.is_set() and calls.expert_load().placement_number == before:
                    time.sleep(0.05)
                after = calls.expert_load().placement_number
                num_moves, before = num_moves + (after != before), after
            runner.join()
            gaps = sorted(talk.gaps_s)
            texts[name] = talk.texts
            line = {
                "bench": "moe_moves",
                "round": number,
                "half": name,
                "num_moves": num_moves,
                "tokens_per_s": options.streams * options.tokens / (time.perf_counter() - start_s),
                "median_gap_ms": 1e3 * statistics.median(gaps),
                "p99_gap_ms": 1e3 * gaps[int(0.99 * len(gaps))],
                "max_gap_ms": 1e3 * gaps[-1],
            }
            if name == "moving":
                rest = found["undisturbed"][-1]
                line["pause_steps"] = (line["max_gap_ms"] - rest["max_gap_ms"]) / rest["median_gap_ms"]
                line["equal_texts"] = sum(text == texts["undisturbed"][i] for i, text in talk.texts.items()) / options.streams
                assert options.dtype != "float32" or line["equal_texts"] == 1.0, "a token changed"
            found[name].append(line)
            print(json.dumps(line), flush=True)
    calls.close()
    print(f"{'':<12}{'median ms':>11}{'p99 ms':>9}{'max ms':>9}{'tokens/s':>10}{'moves':>7}")
    for name, lines in found.items():
        keys = ("median_gap_ms", "p99_gap_ms", "max_gap_ms", "tokens_per_s", "num_moves")
        a, b, c, d, e = (statistics.median(line[key] for line in lines) for key in keys)
        print(f"{name:<12}{a:>11.1f}{b:>9.1f}{c:>9.1f}{d:>10.0f}{e:>7.0f}")


if __name__ == "__main__":
    main()
