"""Decode, prefill and mixed load of a deployment of real worker processes, asked over the engines' own sessions (control speed).

The gateway is left out: what is measured is the data plane. Rates are taken from the window in which every request of the batch
decodes. Must not know: terminals.
"""

from __future__ import annotations

import asyncio
import os
import random
import re
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from antiphon.apps.serve.local import DirectDeployment
from antiphon.core.document.spec import LLMDeployment
from antiphon.core.errors import DeadlineExceeded, InvalidInput, Unavailable
from antiphon.core.ids import Role
from antiphon.core.request import Request, RequestId, SamplingParams
from antiphon.core.worker_info import WorkerInfo
from antiphon.directory.memory import open_directory
from antiphon.models.families import describe
from antiphon.models.loading.checkpoint import Checkpoint
from antiphon.models.loading.source import resolve
from antiphon.rpc.engine.session import EngineSession
from antiphon.telemetry import step_timeline, step_trace
from antiphon.telemetry.stages import attention_figures, difference, ffn_figures

START_TIMEOUT_S = 180.0
RUN_TIMEOUT_S = 600.0
_FFN = "ffn."  # before the names of FFN workers' sums, which attention workers have too
SHARED = "@shared"  # behind a wiring: every worker may use all of the processors, rather than a part of them
_LEASE_S = 1.0  # records, and the figures in them, are renewed three times as often


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchSetup:
    """What is measured: a model, a wiring such as monolith, P/D, 1A1F, 2A3F or 1A1F@shared, and the machine's share it gets."""

    uri: str
    wiring: str = "monolith"
    dtype: str = "bfloat16"
    cores: tuple[int, ...] = ()  # dealt out to the workers in equal runs; empty = all of this process
    num_ubatches: int | str = "auto"
    transport: str = "auto"
    max_model_len: int = 2048
    max_num_seqs: int = 128
    max_num_batched_tokens: int = 1024
    max_drafts: int | None = None  # speculate, with so many guesses of a request and step at most; None = off
    trace_steps: bool = False  # every worker keeps what its steps do; see ``BenchDeployment.timeline``

    def document(self) -> LLMDeployment:
        """The deployment document of this set-up."""
        cores = list(self.cores) or sorted(os.sched_getaffinity(0))
        pools = _pools(self.wiring.removesuffix(SHARED))
        num_workers = sum(pool["replicas"] for pool in pools)
        share = max(1, len(cores) // num_workers)
        run = len(cores) if self.wiring.endswith(SHARED) else share
        at = 0
        for pool in pools:
            starts = [at + i * share for i in range(pool["replicas"])]
            pool["cores"] = [cores[(start + i) % len(cores)] for start in starts for i in range(run)]
            pool["threads"] = run
            at += share * pool["replicas"]
        topology = {1: "monolith", 2: "pd" if pools[0]["role"] == "prefill" else "afd", 3: "pd-afd"}[len(pools)]
        return LLMDeployment.model_validate(
            {
                "apiVersion": "serving.antiphon.dev/v1alpha1",
                "kind": "LLMDeployment",
                "metadata": {"name": "bench"},
                "spec": {
                    "model": {"uri": self.uri, "dtype": self.dtype, "maxModelLen": self.max_model_len},
                    "topology": topology,
                    "pools": pools,
                    "transport": {"activations": self.transport, "kv": self.transport, "numUbatches": self.num_ubatches},
                    "scheduler": {
                        "maxNumSeqs": self.max_num_seqs,
                        "maxNumBatchedTokens": self.max_num_batched_tokens,
                        "maxQueuedRequests": 4096,
                    },
                    "cache": {"memory": "1Gi", "prefixCaching": False},
                    "endpoint": {"httpPort": 0, "grpcPort": 0},
                    "directory": {"leaseS": _LEASE_S},
                    "speculation": None if self.max_drafts is None else {"maxDrafts": self.max_drafts},
                },
            }
        )


def _pools(wiring: str) -> list[dict[str, Any]]:
    if wiring == "monolith":
        return [{"name": "monolith", "role": "monolith", "replicas": 1}]
    if wiring == "P/D":
        return [{"name": "prefill", "role": "prefill", "replicas": 1}, {"name": "decode", "role": "decode", "replicas": 1}]
    match = re.fullmatch(r"(P/D\+)?(\d+)A(\d+)F", wiring)
    if match is None:
        raise InvalidInput(
            f"no wiring {wiring!r}; expected monolith, P/D, xAyF (1A1F, 2A3F, ...) or P/D+xAyF, with {SHARED} behind it or not",
            "wiring",
        )
    attention, ffn = int(match[2]), int(match[3])
    pools: list[dict[str, Any]] = [{"name": "prefill", "role": "prefill", "replicas": 1}] if match[1] else []
    pools.append({"name": "attention", "role": "attention", "replicas": attention})
    pools.append({"name": "ffn", "role": "ffn", "replicas": ffn, "parallelism": {"tensor": ffn}})
    return pools


@dataclass(slots=True)
class Progress:
    """Arrival times of one request's tokens."""

    submitted_s: float
    token_ids: list[int] = field(default_factory=list)
    num_steps: int = 0  # that brought tokens
    token_s: list[float] = field(default_factory=list)
    ended_s: float | None = None
    error: str | None = None


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
        async with _Sessions(self) as sessions:
            run = []
            for index, prompt in enumerate(prompts):
                asked = self._request(1, 1)
                seeded = replace(sampling, seed=sampling.seed + index)
                run.append(sessions.submit(replace(asked, prompt_token_ids=tuple(prompt), sampling=seeded), index))
            while not all(p.ended_s for p in run):
                await sessions.turn(run)
        return run

    async def _decode(self, batch: int, num_prompt: int, num_generated: int) -> dict[str, Any]:
        async with _Sessions(self) as sessions:
            run = [sessions.submit(self._request(num_prompt, num_generated), i) for i in range(batch)]
            while any(len(p.token_s) < 2 for p in run):
                await sessions.turn(run)
            stale = first = last = await sessions.figures()
            while not any(p.ended_s for p in run):
                await asyncio.sleep(_LEASE_S / 4)
                last = await sessions.figures()
                if first is stale and last["num_steps"] != stale["num_steps"]:
                    first = last  # the figures before it may be from the time of the prompts
                await sessions.turn(run, wait=False)
            while not all(p.ended_s for p in run):
                await sessions.turn(run)
            delta = difference(last, first)
            give_up_s = time.monotonic() + 2 * _LEASE_S
            while not self._is_whole(delta) and time.monotonic() < give_up_s:
                await asyncio.sleep(_LEASE_S / 4)  # it was over before every record was renewed: from its start to the next renewal
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
        async with _Sessions(self) as sessions:
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
        async with _Sessions(self) as sessions:
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


class _Sessions:
    """Sessions with every generating worker; requests are dealt out in turn."""

    def __init__(self, bench: BenchDeployment) -> None:
        self._bench = bench
        self._directory = open_directory(bench._deployment.directory_address)
        self._sessions: list[EngineSession] = []
        self._readers: list[asyncio.Task[None]] = []
        self._requests: dict[RequestId, Progress] = {}
        self._news = asyncio.Event()

    async def __aenter__(self) -> Self:
        for info in await self._generating():
            session = EngineSession(info.endpoint.rpc)
            await session.open(START_TIMEOUT_S)
            self._sessions.append(session)
            self._readers.append(asyncio.create_task(self._read(session)))
        self._deadline = time.monotonic() + RUN_TIMEOUT_S
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for session in self._sessions:
            await session.close()
        for reader in self._readers:
            reader.cancel()
        await asyncio.gather(*self._readers, return_exceptions=True)
        await self._directory.close()

    def submit(self, request: Request, turn: int) -> Progress:
        progress = self._requests[request.request_id] = Progress(submitted_s=time.perf_counter())
        self._sessions[turn % len(self._sessions)].submit(request, deadline_left_s=RUN_TIMEOUT_S)
        return progress

    async def turn(self, run: Sequence[Progress], *, wait: bool = True) -> None:
        """Let tokens arrive. Raises what a request or a session failed with."""
        if wait:
            self._news.clear()
            await asyncio.wait_for(self._news.wait(), RUN_TIMEOUT_S)
        else:
            await asyncio.sleep(0)
        for reader in self._readers:
            if reader.done():
                reader.result()
        failed = [p.error for p in run if p.error is not None]
        if failed:
            raise Unavailable(f"a request failed: {failed[0]}")
        if time.monotonic() > self._deadline:
            raise DeadlineExceeded(f"the run did not end within {RUN_TIMEOUT_S:g} s")

    async def figures(self) -> Mapping[str, float]:
        """Sums since start over the generating workers, and over FFN workers, as their leases have them now."""
        total: dict[str, float] = {"num_steps": 0.0}
        for info in await self._workers():
            if info.role.generates:
                sums = {**info.load.gauges, "num_steps": float(info.load.num_steps)}
            elif info.role is Role.FFN:
                sums = {_FFN + name: value for name, value in info.load.gauges.items()}
            else:
                continue
            for name, value in sums.items():
                total[name] = total.get(name, 0.0) + value
        return total

    async def _generating(self) -> list[WorkerInfo]:
        return [info for info in await self._workers() if info.role.generates]

    async def _workers(self) -> list[WorkerInfo]:
        return [record.info for record in await self._directory.workers("bench")]

    async def _read(self, session: EngineSession) -> None:
        async for answers in session.updates():
            now = time.perf_counter()
            for answer in answers:
                progress = self._requests.get(answer.output.request_id)
                if progress is None:
                    continue
                progress.token_s += [now] * len(answer.output.new_token_ids)
                progress.token_ids += answer.output.new_token_ids
                progress.num_steps += bool(answer.output.new_token_ids)
                if answer.output.finish_reason is not None:
                    progress.ended_s = now
                    progress.error = None if answer.error is None else str(answer.error)
            self._news.set()


def _of_ffn(figures: Mapping[str, float]) -> dict[str, float]:
    return {name.removeprefix(_FFN): value for name, value in figures.items() if name.startswith(_FFN)}


def _tracing(document: LLMDeployment, directory: Path) -> LLMDeployment:
    spec = document.spec
    pools = tuple(pool.model_copy(update={"env": {**pool.env, step_trace.VARIABLE: str(directory)}}) for pool in spec.pools)
    return document.model_copy(update={"spec": spec.model_copy(update={"pools": pools})})


def _percentile(values: Sequence[float], percent: int) -> float | None:
    return values[min(len(values) - 1, len(values) * percent // 100)] if values else None
