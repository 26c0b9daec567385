"""Decode, prefill and mixed load of a deployment of real worker processes, asked over the engines' own sessions (control speed).

The gateway is left out: what is measured is the data plane. Rates are taken from the window in which every request of the batch
decodes. Must not know: terminals.
"""

from __future__ import annotations

import asyncio
import random
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from antiphon.apps.bench.sessions import FFN, START_TIMEOUT_S, Progress, Sessions
from antiphon.apps.bench.setup import LEASE_S, BenchSetup
from antiphon.apps.serve.local import DirectDeployment
from antiphon.core.document.spec import LLMDeployment
from antiphon.core.errors import DeadlineExceeded
from antiphon.core.ids import Role
from antiphon.core.request import Request, RequestId, SamplingParams
from antiphon.models.families import describe
from antiphon.models.loading.checkpoint import Checkpoint
from antiphon.models.loading.source import resolve
from antiphon.telemetry import step_timeline, step_trace
from antiphon.telemetry.stages import attention_figures, difference, ffn_figures


class BenchDeployment:
    """The deployment under measurement; a context manager."""

    def __init__(self, setup: BenchSetup) -> None:
        self.setup = setup
        self._run_dir = tempfile.TemporaryDirectory(prefix="antiphon-bench-")
        self._trace_dir = Path(self._run_dir.name) / "steps"
        self._document = _tracing(setup.document(), self._trace_dir) if setup.trace_steps else setup.document()
        self._timeline: dict[str, Any] = {}
        checkpoint = resolve(setup.uri)
        self._num_layers = describe(Checkpoint.open(checkpoint).config).num_layers
        self._deployment = DirectDeployment(self._document, checkpoint=str(checkpoint), run_dir=Path(self._run_dir.name))
        self._runner = asyncio.Runner()  # one loop for all runs: grpc's channels keep to the loop they met first
        self._random = random.Random(0)
        self._number = 0

    def __enter__(self) -> Self:
        self._deployment.start()
        deadline = time.monotonic() + START_TIMEOUT_S
        while not self._deployment.poll():
            if time.monotonic() > deadline:
                self._deployment.close()
                raise DeadlineExceeded(f"the deployment was not ready within {START_TIMEOUT_S:g} s")
            time.sleep(0.1)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._deployment.close()
        self._runner.close()  # after what its channels lead to: grpc tells it of their end
        if self.setup.trace_steps:
            self._timeline = step_timeline.chrome(step_trace.load(self._trace_dir))
        self._run_dir.cleanup()

    def timeline(self) -> dict[str, Any]:
        """What the workers' steps did, as Chrome/Perfetto JSON: after the deployment was left, if it was to trace."""
        return self._timeline

    def decode(self, batch: int, *, num_prompt: int = 128, num_generated: int = 128) -> dict[str, Any]:
        """Steady decode of ``batch`` requests at once; one line of figures."""
        return self._runner.run(self._decode(batch, num_prompt, num_generated))

    def prefill(self, num_prompt: int, *, repeats: int = 5) -> dict[str, Any]:
        """Time to the first token of one prompt at a time; one line of figures."""
        return self._runner.run(self._prefill(num_prompt, repeats))

    def mixed(self, rate_per_s: float, duration_s: float, *, num_prompt: int = 256, num_generated: int = 64) -> dict[str, Any]:
        """Poisson arrivals for ``duration_s`` seconds; one line of figures."""
        return self._runner.run(self._mixed(rate_per_s, duration_s, num_prompt, num_generated))

    def answer(self, prompts: Sequence[Sequence[int]], sampling: SamplingParams) -> list[Progress]:
        """All prompts at once, to their ends; draw with the seed and the prompt's number."""
        return self._runner.run(self._answer(prompts, sampling))

    # ---- inside ------------------------------------------------------------------------------------------------

    async def _answer(self, prompts: Sequence[Sequence[int]], sampling: SamplingParams) -> list[Progress]:
        async with Sessions(self._deployment.directory_address) as sessions:
            run = []
            for index, prompt in enumerate(prompts):
                asked = self._request(1, 1)
                seeded = replace(sampling, seed=sampling.seed + index)
                run.append(sessions.submit(replace(asked, prompt_token_ids=tuple(prompt), sampling=seeded), index))
            while not all(p.ended_s for p in run):
                await sessions.turn(run)
        return run

    async def _decode(self, batch: int, num_prompt: int, num_generated: int) -> dict[str, Any]:
        async with Sessions(self._deployment.directory_address) as sessions:
            run = [sessions.submit(self._request(num_prompt, num_generated), i) for i in range(batch)]
            while any(len(p.token_s) < 2 for p in run):
                await sessions.turn(run)
            stale = first = last = await sessions.figures()
            while not any(p.ended_s for p in run):
                await asyncio.sleep(LEASE_S / 4)
                last = await sessions.figures()
                if first is stale and last["num_steps"] != stale["num_steps"]:
                    first = last  # the figures before it may be from the time of the prompts
                await sessions.turn(run, wait=False)
            while not all(p.ended_s for p in run):
                await sessions.turn(run)
            delta = difference(last, first)
            give_up_s = time.monotonic() + 2 * LEASE_S
            while not self._is_whole(delta) and time.monotonic() < give_up_s:
                await asyncio.sleep(LEASE_S / 4)  # it was over before every record was renewed: from its start to the next renewal
                delta = difference(await sessions.figures(), stale)
            start = max(p.token_s[0] for p in run)
            end = min(p.token_s[-1] for p in run)
            num_tokens = sum(sum(start < t <= end for t in p.token_s) for p in run)
            rate = num_tokens / (end - start) if end > start else 0.0
            gaps = [b - a for p in run for a, b in zip(p.token_s, p.token_s[1:], strict=False) if start <= a and b <= end]
        line = {
            "bench": "decode",
            **self._facts(),
            "batch": batch,
            "context": num_prompt + num_generated / 2,
            "tokens_per_s": rate,
            "decode_step_s": batch / rate if rate else None,
            "decode_step_p50_s": statistics.median(gaps) if gaps else None,  # what else runs here for a moment doesn't move it
        }
        stages = attention_figures(delta)
        if stages:
            num_ubatches = round(stages["exchanges_per_step"] / self._num_layers)
            line |= {"num_layers": self._num_layers, "num_ubatches": num_ubatches, "rows": batch / max(1, num_ubatches)}
        beyond = {f"ffn_{name}": value for name, value in ffn_figures(_of_ffn(delta)).items()}
        if stages and beyond:
            beyond["busier_bubble_share"] = min(stages["bubble_share"], beyond["ffn_bubble_share"])
        return line | stages | beyond

    def _is_whole(self, delta: Mapping[str, float]) -> bool:
        """Whether there are figures of every side that this deployment has."""
        has_ffn = any(pool.worker_role is Role.FFN for pool in self._document.spec.pools)
        return bool(attention_figures(delta)) and (not has_ffn or bool(ffn_figures(_of_ffn(delta))))

    async def _prefill(self, num_prompt: int, repeats: int) -> dict[str, Any]:
        times = []
        async with Sessions(self._deployment.directory_address) as sessions:
            for turn in range(repeats + 1):
                progress = sessions.submit(self._request(num_prompt, 1), 0)
                while progress.ended_s is None:
                    await sessions.turn([progress])
                if turn > 0:  # the first warms up
                    times.append(progress.token_s[0] - progress.submitted_s)
        median = statistics.median(times)
        return {
            "bench": "prefill",
            **self._facts(),
            "num_prompt": num_prompt,
            "ttft_s": median,
            "tokens_per_s": num_prompt / median,
        }

    async def _mixed(self, rate_per_s: float, duration_s: float, num_prompt: int, num_generated: int) -> dict[str, Any]:
        run: list[Progress] = []
        async with Sessions(self._deployment.directory_address) as sessions:
            start = time.perf_counter()
            due = start
            while due < start + duration_s or not all(p.ended_s for p in run):
                now = time.perf_counter()
                while due <= now and due < start + duration_s:
                    run.append(sessions.submit(self._request(num_prompt, num_generated), len(run)))
                    due += self._random.expovariate(rate_per_s)
                await sessions.turn(run, wait=False)
                await asyncio.sleep(0.002)
            took = time.perf_counter() - start
        served = [p for p in run if p.token_s]
        ttft = sorted(p.token_s[0] - p.submitted_s for p in served)
        itl = sorted(b - a for p in served for a, b in zip(p.token_s, p.token_s[1:], strict=False))
        return {
            "bench": "mixed",
            **self._facts(),
            "rate_per_s": rate_per_s,
            "num_requests": len(run),
            "num_failed": sum(p.error is not None for p in run),
            "tokens_per_s": sum(len(p.token_s) for p in run) / took,
            **{f"ttft_p{q}_s": _percentile(ttft, q) for q in (50, 90, 99)},
            **{f"itl_p{q}_s": _percentile(itl, q) for q in (50, 90, 99)},
        }

    def _facts(self) -> dict[str, Any]:
        pools = self._document.spec.pools
        return {
            "model": self.setup.uri.rsplit("/", 1)[-1],
            "wiring": self.setup.wiring,
            "dtype": self.setup.dtype,
            "threads": len({core for pool in pools for core in pool.cores or ()}),
        }

    def _request(self, num_prompt: int, num_generated: int) -> Request:
        self._number += 1
        prefill = next((f"bench/{pool.name}/0" for pool in self._document.spec.pools if pool.role == "prefill"), None)
        return Request(
            request_id=RequestId(f"bench-{self._number}"),
            prompt_token_ids=tuple(self._random.randrange(10, 200) for _ in range(num_prompt)),
            sampling=SamplingParams(max_tokens=num_generated, temperature=0.0, ignore_eos=True),
            prefill_worker=prefill,
        )


def _of_ffn(figures: Mapping[str, float]) -> dict[str, float]:
    return {name.removeprefix(FFN): value for name, value in figures.items() if name.startswith(FFN)}


def _tracing(document: LLMDeployment, directory: Path) -> LLMDeployment:
    spec = document.spec
    pools = tuple(pool.model_copy(update={"env": {**pool.env, step_trace.VARIABLE: str(directory)}}) for pool in spec.pools)
    return document.model_copy(update={"spec": spec.model_copy(update={"pools": pools})})


def _percentile(values: Sequence[float], percent: int) -> float | None:
    return values[min(len(values) - 1, len(values) * percent // 100)] if values else None
