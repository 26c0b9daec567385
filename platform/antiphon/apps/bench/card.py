"""What ``make gpu`` measures of a card: our kernels and halves, as shares of what it was seen to do (control speed).

    ceilings      copy bandwidth, matrix rate, a launch by Python and by a graph: what everything below is divided by
    suites        the cards' op suite, families and wirings against transformers, losses of workers: our own tests, on the card
    decode        bytes that a step must read over its time, over the copy bandwidth; eager, and as one recorded graph
    engine        the same by a whole engine with KV sized by the card, its steps decided ahead and in turn: equal tokens
    prefill       arithmetic of a step over its time, over the matrix rate
    1A1F          halves apart, replayed with an exchange between; an FFN process killed (``card_split``)
    transformers  the same shape through ``generate``

A section that fails says so in its line and the next one runs. Weights are random, of public models' shapes with fewer layers;
times are the card's own events. Nothing outside the card's memory is changed: no clocks, no modes.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from antiphon.apps.bench.card_engine import decoded
from antiphon.core.ids import FFNShard
from antiphon.device.graphs import CudaGraphs, Graphs, TapeGraphs
from antiphon.device.memory import CardMemory
from antiphon.models.attention.kv_cache import KVCache
from antiphon.models.cache_layout import kv_layout
from antiphon.models.decoder import AttentionHalves, FFNHalves
from antiphon.models.families import describe
from antiphon.worker.batch_builder import BatchBuilder, Run

ROOT = Path(__file__).parents[4]
_SUITES = (
    ("op suite", ("tests/cards/test_values.py",)),
    ("recorded steps against eager ones", ("tests/cards/test_graphs.py", "tests/cards/test_split.py")),
    ("overlapped steps against steps in turn", ("tests/cards/test_overlap.py",)),
    ("families and wirings against transformers", ("tests/golden/families", "tests/golden/test_wirings.py")),
    ("losses of FFN workers", ("tests/contract/test_split_faults.py",)),
)
_SUITE_DEADLINE_S = 150.0
BLOCK = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A dense decoder: a public model's layer, some of its layers."""

    name: str
    hidden: int
    width: int
    heads: int
    kv_heads: int
    dim: int
    layers: int
    vocab: int

    @property
    def config(self) -> dict[str, Any]:
        """The checkpoint's config.json."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.hidden,
            "intermediate_size": self.width,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.dim,
            "num_hidden_layers": self.layers,
            "vocab_size": self.vocab,
            "max_position_embeddings": 16_384,
            "rms_norm_eps": 1e-5,
            "rope_theta": 500_000.0,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
            "hidden_act": "silu",
        }

    @property
    def num_weights(self) -> int:
        """Numbers that a decode step reads: every layer's matrices and the head."""
        attention = self.hidden * self.dim * (2 * self.heads + 2 * self.kv_heads)
        return self.layers * (attention + 3 * self.hidden * self.width) + self.vocab * self.hidden

    @property
    def kv_numbers(self) -> int:
        """Numbers of K and V per token, over all layers."""
        return 2 * self.layers * self.kv_heads * self.dim


SHAPES = (
    Shape(name="8B, 8 layers", hidden=4096, width=14_336, heads=32, kv_heads=8, dim=128, layers=8, vocab=128_256),
    Shape(name="1B, 16 layers", hidden=2048, width=8192, heads=32, kv_heads=8, dim=64, layers=16, vocab=128_256),
)


class RandomCheckpoint:
    """As much of a checkpoint as the halves read, made where it is used: no file of sixteen gigabytes is written."""

    def __init__(self, shape: Shape, device: torch.device) -> None:
        self.config = shape.config
        self._device = device
        d, q, kv = shape.hidden, shape.heads * shape.dim, shape.kv_heads * shape.dim
        self._shapes = {
            "q_proj": (q, d),
            "k_proj": (kv, d),
            "v_proj": (kv, d),
            "o_proj": (d, q),
            "gate_proj": (shape.width, d),
            "up_proj": (shape.width, d),
            "down_proj": (d, shape.width),
            "embed_tokens": (shape.vocab, d),
            "lm_head": (shape.vocab, d),
        }
        self._norm = (d,)

    path = Path("random")  # nothing is there: requests have no grammars

    @property
    def names(self) -> frozenset[str]:
        """Nothing is stored in another form."""
        return frozenset()

    def dtype(self, _name: str) -> torch.dtype:
        """All of them are stored in one."""
        return torch.bfloat16

    def tensor(
        self,
        name: str,
        rows: tuple[int, int] | None = None,
        cols: tuple[int, int] | None = None,
        dtype: torch.dtype | None = None,
    ) -> torch.Tensor:
        """Random numbers of the tensor's shape, small enough that sums stay finite over any number of layers."""
        key = name.removesuffix(".weight").rpartition(".")[2]
        shape = self._shapes.get(key, self._norm)
        if len(shape) == 1:
            return torch.ones(shape, dtype=dtype, device=self._device)
        chance = torch.Generator(self._device).manual_seed(zlib.crc32(name.encode()))  # the same in every process
        made: torch.Tensor = torch.randn(shape, device=self._device, dtype=dtype, generator=chance) * shape[1] ** -0.5
        made = made if rows is None else made[rows[0] : rows[1]]
        return made if cols is None else made[:, cols[0] : cols[1]]

    def close(self) -> None:
        """Nothing is open."""


@dataclass(slots=True, kw_only=True)
class Bench:
    """One run: where, with which ceilings, and what was found."""

    device: torch.device
    memory: CardMemory | None = None  # of the card; None: a CPU is taken for one
    repeats: int = 20
    copy_bytes_per_s: float = 0.0
    flops: float = 0.0
    found: dict[str, Any] = field(default_factory=dict)

    def time_s(self, run: Callable[[], object], repeats: int | None = None) -> float:
        """Median seconds of one run, by the card's events."""
        repeats = self.repeats if repeats is None else repeats
        run()
        times: list[float] = []
        for _ in range(repeats):
            if self.device.type == "cuda":
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
                begin.record()
                run()
                end.record()
                end.synchronize()
                times.append(begin.elapsed_time(end) / 1e3)
            else:
                start_s = time.perf_counter()
                run()
                times.append(time.perf_counter() - start_s)
        return sorted(times)[len(times) // 2]

    def ceilings(self, num_bytes: int = 1 << 30, side: int = 8192) -> str:
        """Measure what the card itself does."""
        source = torch.empty(num_bytes, dtype=torch.uint8, device=self.device).random_()
        target = torch.empty_like(source)
        self.copy_bytes_per_s = 2 * num_bytes / self.time_s(lambda: target.copy_(source))
        a = torch.randn(side, side, device=self.device).to(torch.bfloat16)
        b = torch.randn(side, side, device=self.device).to(torch.bfloat16)
        self.flops = 2 * side**3 / self.time_s(lambda: a @ b)
        one = torch.zeros(1, device=self.device)

        def launches() -> None:
            for _ in range(100):
                one.add_(1)

        eager_s = self.time_s(launches) / 100
        recorded, _ = self.graphs().record(launches)
        graph_s = self.time_s(recorded.replay) / 100
        self.found["ceilings"] = {
            "copy_bytes_per_s": self.copy_bytes_per_s,
            "bf16_flops": self.flops,
            "launch_eager_s": eager_s,
            "launch_graph_s": graph_s,
        }
        return (
            f"copy {self.copy_bytes_per_s / 1e9:.0f} GB/s, bf16 {self.flops / 1e12:.1f} TFLOP/s, "
            f"launch {eager_s * 1e6:.1f} us, within a graph {graph_s * 1e6:.1f} us"
        )

    def graphs(self) -> Graphs:
        """Graphs of the card, or their stand-in."""
        return CudaGraphs(self.device) if self.device.type == "cuda" else TapeGraphs()

    def decode(self, shape: Shape, batches: Sequence[int], context: int) -> str:
        """One token for each of ``batch`` requests of ``context`` tokens: eager and as a graph, over the copy bandwidth."""
        step, build = self._model(shape, max(batches), context)
        lines = []
        for batch in batches:
            blocks = -(-context // BLOCK)
            runs = [
                Run(
                    token_ids=range(context),
                    block_ids=range(i * blocks, (i + 1) * blocks),
                    first_token=context - 1,
                    num_tokens=1,
                )
                for i in range(batch)
            ]
            inputs = build(runs)
            num_bytes = 2 * (shape.num_weights + batch * context * shape.kv_numbers)
            eager_s = self.time_s(lambda inputs=inputs: step(*inputs))  # type: ignore[misc]
            recorded, _ = self.graphs().record(lambda inputs=inputs: step(*inputs))  # type: ignore[misc]
            graph_s = self.time_s(recorded.replay)
            shares = {name: num_bytes / s / self.copy_bytes_per_s for name, s in (("eager", eager_s), ("graph", graph_s))}
            self.found[f"decode {shape.name}, batch {batch}"] = {"eager_s": eager_s, "graph_s": graph_s, "share_of_copy": shares}
            lines.append(
                f"batch {batch}: {shares['graph']:.2f} of copy ({batch / graph_s:.0f} tokens/s; eager {shares['eager']:.2f})"
            )
        return "; ".join(lines)

    def engine(self, shape: Shape, batches: Sequence[int], context: int, num_tokens: int = 64) -> str:
        """Whole engines, KV sized by the card: tokens a second with steps decided ahead and in turn, which must be the same."""
        lines = []
        for batch in batches:
            found = {}
            for name in ("ahead", "in turn"):
                made = RandomCheckpoint(shape, self.device)
                found[name] = decoded(made, self.device, self.memory, batch, context, num_tokens, overlaps=name == "ahead")
            num_bytes = 2 * (shape.num_weights + batch * context * shape.kv_numbers)
            shares = {name: num_bytes / each.step_s / self.copy_bytes_per_s for name, each in found.items()}
            ahead = found["ahead"]
            self.found[f"engine {shape.name}, batch {batch}"] = {
                "step_s": {name: each.step_s for name, each in found.items()},
                "share_of_copy": shares,
                "num_blocks": ahead.num_blocks,
                "cache_bytes": ahead.cache_bytes,
                "steps_ahead": ahead.num_ahead,
            }
            if ahead.tokens != found["in turn"].tokens:
                raise RuntimeError(f"batch {batch}: steps decided ahead give other tokens than steps in turn")
            lines.append(
                f"batch {batch}: {shares['ahead']:.2f} of copy ({batch / ahead.step_s:.0f} tokens/s; in turn "
                f"{shares['in turn']:.2f}), {ahead.num_blocks} blocks, {ahead.cache_bytes / 2**30:.1f} GiB"
            )
        return "; ".join(lines)

    def prefill(self, shape: Shape, num_tokens: int) -> str:
        """One prompt, over the matrix rate."""
        step, build = self._model(shape, 1, num_tokens)
        run = Run(token_ids=range(num_tokens), block_ids=range(-(-num_tokens // BLOCK)), first_token=0, num_tokens=num_tokens)
        inputs = build([run])
        seconds = self.time_s(lambda: step(*inputs), 5)
        attention = 2 * shape.layers * shape.heads * shape.dim * num_tokens**2  # causal: half of 4 N H T^2
        flops = 2 * (shape.num_weights - shape.vocab * shape.hidden) * num_tokens + attention
        share = flops / seconds / self.flops
        self.found[f"prefill {shape.name}"] = {"seconds": seconds, "tokens": num_tokens, "share_of_matrix_rate": share}
        return f"{num_tokens} tokens in {seconds * 1e3:.1f} ms: {share:.2f} of the matrix rate"

    def transformers(self, shape: Shape, batches: Sequence[int], context: int, num_tokens: int = 32) -> str:
        """``generate`` of the same shape: seconds per token, next to what was measured of ours."""
        from transformers import LlamaConfig, LlamaForCausalLM

        keep = {key: value for key, value in shape.config.items() if key not in ("architectures", "model_type", "torch_dtype")}
        with torch.device(self.device):
            made: Any = LlamaForCausalLM(LlamaConfig(**keep))
            model = made.to(torch.bfloat16).eval()
        lines = []
        for batch in batches:
            ids = torch.randint(1, shape.vocab, (batch, context), device=self.device)

            def generate(count: int, ids: torch.Tensor = ids) -> None:
                with torch.inference_mode():
                    model.generate(ids, max_new_tokens=count, min_new_tokens=count, do_sample=False, pad_token_id=0)

            first_s, all_s = self.time_s(lambda: generate(1), 2), self.time_s(lambda: generate(1 + num_tokens), 2)
            token_s = (all_s - first_s) / num_tokens
            ours = self.found.get(f"decode {shape.name}, batch {batch}", {}).get("graph_s")
            ratio = None if ours is None else token_s / ours
            self.found[f"transformers {shape.name}, batch {batch}"] = {"token_s": token_s, "ours_faster_by": ratio}
            lines.append(f"batch {batch}: {token_s * 1e3:.2f} ms a token" + ("" if ratio is None else f", {ratio:.1f} x ours"))
        return "; ".join(lines)

    def _model(self, shape: Shape, num_requests: int, context: int) -> tuple[Callable[..., torch.Tensor], Callable[..., Any]]:
        checkpoint: Any = RandomCheckpoint(shape, self.device)
        config, dtype = describe(shape.config), torch.bfloat16
        halves = AttentionHalves(config, checkpoint, dtype, self.device, context + BLOCK)
        ffn = FFNHalves(config, checkpoint, dtype, self.device, FFNShard())
        cache = KVCache(kv_layout(config, dtype, BLOCK), num_requests * -(-context // BLOCK), self.device)
        builder = BatchBuilder(cache, self.device, context + BLOCK, with_slots=halves.reads_context_slots)

        def step(ids: torch.Tensor, batch: Any) -> torch.Tensor:
            with torch.inference_mode():
                state = halves.begin(ids, batch)
                for layer in range(config.num_layers):
                    (out,) = halves.attend(layer, state, cache)
                    halves.combine(layer, state, [ffn.compute(out.ffn, out.rows_TD)])
                return halves.greedy(state.x_TD[-num_requests:])[0]

        return step, builder.build


def suite(paths: Sequence[str]) -> str:
    """Some of the project's own tests, on the card. Raises RuntimeError with their end where one fails."""
    environment = {**os.environ, "ANTIPHON_TEST_CARD": "1", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-x", *paths]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=_SUITE_DEADLINE_S, check=False
    )
    if done.returncode:
        raise RuntimeError("; ".join((done.stdout + done.stderr).strip().splitlines()[-3:]))
    return done.stdout.strip().splitlines()[-1]


def sections(bench: Bench) -> list[tuple[str, Callable[[], str]]]:
    """What is run, in order: the ceilings come first, because shares are of them."""
    from antiphon.apps.bench import card_split

    large, small = SHAPES
    found: list[tuple[str, Callable[[], str]]] = [("ceilings", bench.ceilings)]
    found += [(name, lambda paths=paths: suite(paths)) for name, paths in _SUITES]  # type: ignore[misc]
    found += [
        (f"decode {large.name}, context 1k", lambda: bench.decode(large, (1, 8, 32, 128, 256), 1024)),
        (f"decode {small.name}, context 1k", lambda: bench.decode(small, (1,), 1024)),
        (f"engine {large.name}, context 1k", lambda: bench.engine(large, (1, 32, 128), 1024)),
        (f"engine {small.name}, context 1k", lambda: bench.engine(small, (1,), 1024)),
        (f"prefill {large.name}", lambda: bench.prefill(large, 8192)),
        *card_split.sections(bench, large),
        (f"transformers {large.name}", lambda: bench.transformers(large, (1, 32), 1024)),
    ]
    return found


def run_sections(parts: Sequence[tuple[str, Callable[[], str]]], say: Callable[[str], None]) -> dict[str, str]:
    """Run each; what failed, by section. One failure ends no other section."""
    failed: dict[str, str] = {}
    for name, run in parts:
        start_s = time.monotonic()
        try:
            text = run()
        except Exception as error:  # noqa: BLE001  # the next section's figures are worth having
            failed[name] = f"{type(error).__name__}: {error}"
            text = f"FAILED: {failed[name][:300]}"
        say(f"{name}: {text}  [{time.monotonic() - start_s:.0f} s]")
    return failed
