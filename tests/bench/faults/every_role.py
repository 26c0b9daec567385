"""Kill -9, stop and cut of every role and of its store under streams: is every stream whole, and how long is the pause.

    python tests/bench/faults/every_role.py [--streams 32] [--seconds 12] [--faults kill stop cut] [--roles ffn ...]
        [--num-ffn 1] [--num-gateways 1] [--store directory] [--composition] [--transport auto]

Needs Linux and root: the deployment (prefill + 2AyF, a tiny model, a real Redis or the embedded store in a process of its own,
gateways in processes of their own; with ``--composition`` a router and a model pool of two experts, which every second stream asks)
is in network namespaces that are made for it and end with it. The first worker of each pool, the first gateway, the router and the
store each have one: a cut takes its link down at the far end, so that what is sent to it is lost without a word. Streams come
through the SDK over gRPC, which resumes what a lost gateway leaves. One JSON line a fault, of the streams that overlap it:
``pause_s`` is the longest silence of any, ``num_wrong`` those with another text than the model's or expert's that answered them has
undisturbed, ``num_fallback`` those that another expert answered as the first's workers were away, ``num_errors`` those that ended
early, ``back_s`` how long after its end the role was whole again. Exits with 1 if any stream was not.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fault_system import EXPERTS, WORKERS, System, Wanted

FAULTS = ("kill", "stop", "cut")
WRONG = "another text"  # how such an error begins
START_S, BACK_S, REST_S, HANG_S = 300.0, 300.0, 3.0, 120.0


@dataclass(frozen=True, slots=True)
class Ended:
    """One stream. ``error``: "" = it is whole. ``expert``: who answered for a composition in another's place, else ""."""

    began_s: float
    ended_s: float
    error: str
    expert: str = ""


class Load:
    """Streams without end; what they brought and when."""

    def __init__(self, door: str, num_streams: int, num_tokens: int, models: tuple[str, ...]) -> None:
        from antiphon.client import AsyncClient, RetryPolicy

        self._client = AsyncClient(door, timeout_s=300.0, retry=RetryPolicy(max_attempts=1000))
        self._prompts = [f"stream number {n} " * (1 + n % 5) for n in range(num_streams)]
        self._num_tokens = num_tokens
        self._models = models
        self._chosen: list[str] = []  # by stream: the expert that answers it undisturbed, else ""
        self._expected: dict[tuple[int, str], str] = {}  # by stream and expert
        self.ended: list[Ended] = []
        self.stopped = False
        self.silences: list[tuple[float, float]] = []
        self.began_s: dict[int, float] = {}  # of the streams that are open
        self.last_s = [0.0] * num_streams

    async def learn(self, num_workers: int) -> None:
        """The undisturbed run."""
        deadline = time.monotonic() + START_S
        while len(await self.epochs()) < num_workers:
            if time.monotonic() > deadline:
                raise SystemExit("the deployment did not get ready")
            await asyncio.sleep(0.2)
        numbers = range(len(self._prompts))
        found = await asyncio.gather(*(self._stream(n) for n in numbers))
        self._chosen = [expert for _, expert in found]
        self._expected = {(n, expert): text for n, (text, expert) in enumerate(found)}
        for expert in EXPERTS if any(self._chosen) else ():
            answered = [n for n in numbers if self._chosen[n] and self._chosen[n] != expert]
            texts = await asyncio.gather(*(self._stream(n, expert) for n in answered))
            self._expected |= {(n, expert): text for n, (text, _) in zip(answered, texts, strict=True)}

    async def run(self) -> None:
        """All streams, again and again, until stopped."""
        await asyncio.gather(*(self._again(n) for n in range(len(self._prompts))))

    async def epochs(self) -> dict[str, int]:
        """The workers that a gateway can ask, or whose role is never asked, each with its epoch; none while no gateway answers."""
        try:
            status = await self._client.status(timeout_s=2.0)
        except Exception:  # noqa: BLE001 - it is down
            return {}
        return {worker.worker_id: worker.epoch for worker in status.workers if worker.ready and worker.connected is not False}

    async def ended_since(self, moment_s: float) -> bool:
        """Wait until the streams that were open at a moment have ended; False = one hangs."""
        while any(began_s < moment_s for began_s in self.began_s.values()):
            if any(time.monotonic() - self.last_s[n] > HANG_S for n in self.began_s):
                return False
            await asyncio.sleep(0.1)
        return True

    async def _again(self, number: int) -> None:
        while not self.stopped:
            self.began_s[number] = began_s = time.monotonic()
            error = expert = ""
            try:
                text, expert = await self._stream(number)
                if text != (expected := self._expected[number, expert]):
                    at = next(
                        (n for n, (a, b) in enumerate(zip(text, expected, strict=False)) if a != b), min(len(text), len(expected))
                    )
                    who = expert or self._models[number % len(self._models)]
                    error = f"{WRONG} of {who} from character {at} of {len(expected)} on"
            except Exception as why:  # noqa: BLE001 - whatever ended it is what is counted
                error = f"{type(why).__name__}: {why}"
                await asyncio.sleep(0.2)
            del self.began_s[number]
            self.ended.append(Ended(began_s, time.monotonic(), error, "" if expert == self._chosen[number] else expert))

    async def _stream(self, number: int, model: str = "") -> tuple[str, str]:
        """Its text, and the expert that answered for a composition, else ""."""
        text = ""
        self.last_s[number] = time.monotonic()
        options: dict[str, Any] = {"prompt": self._prompts[number], "temperature": 0, "ignore_eos": True}
        model = model or self._models[number % len(self._models)]
        async with self._client.stream(model, max_tokens=self._num_tokens, **options) as stream:
            async for chunk in stream:
                text += chunk.text
                now = time.monotonic()
                self.silences.append((self.last_s[number], now))
                self.last_s[number] = now
            return text, stream.routed.get("x-antiphon-expert", "")

    def longest(self, since: float, until: float) -> float:
        """The longest silence that overlaps the time."""
        open_s = [(self.last_s[n], time.monotonic()) for n in self.began_s]
        return max((to - at for at, to in [*self.silences, *open_s] if to > since and at < until), default=0.0)

    def outcome(self, since: float, until: float) -> dict[str, Any]:
        """Of the streams that overlap the time, once they have ended."""
        ended = [one for one in self.ended if one.ended_s > since and one.began_s < until]
        errors = [one.error for one in ended if one.error]
        num_wrong = sum(error.startswith(WRONG) for error in errors)
        line = {"num_streams": len(ended), "num_wrong": num_wrong, "num_errors": len(errors) - num_wrong}
        if any(self._chosen):
            line["num_fallback"] = sum(bool(one.expert) for one in ended)
        return line | {"pause_s": round(self.longest(since, until), 2)} | ({"errors": sorted(set(errors))[:5]} if errors else {})


@contextlib.contextmanager
def hurt(system: System, role: str, fault: str) -> Iterator[None]:
    """The fault, and its end."""
    pid = system.pid(role)
    match fault:
        case "kill":
            os.kill(pid, signal.SIGKILL)
            yield
            if role in system.processes:
                system.processes[role].wait()
                system.spawn(role)
        case "stop":
            os.kill(pid, signal.SIGSTOP)
            yield
            os.kill(pid, signal.SIGCONT)
        case "cut":
            system.far[role].cut()
            yield
            system.far[role].mend()


def worker_name(role: str) -> str:
    """The worker that is hurt, as the gateway's status has it."""
    return "red/model-pool/0" if role == "model-pool" else f"tiny/{role}/0"


async def is_whole(load: Load, system: System, role: str, fault: str, epoch: int | None) -> bool:
    """All workers are there; a killed one is another than before."""
    epochs = await load.epochs()
    if len(epochs) < system.wanted.num_workers:
        return False
    if role in WORKERS and fault == "kill":
        return epochs[worker_name(role)] != epoch
    return True


async def measure(system: System, args: argparse.Namespace) -> int:
    """All faults, one after the other; the number of streams that were not whole."""
    models = ("tiny", "coe/colours") if system.wanted.composition else ("tiny",)
    load = Load(system.door, args.streams, args.tokens, models)
    await load.learn(system.wanted.num_workers)
    running = asyncio.create_task(load.run())
    num_cores = len(os.sched_getaffinity(0))

    def told(line: dict[str, Any], since: float, until: float) -> None:
        line = {"bench": "faults", **line, **load.outcome(since, until), "load_1m": round(os.getloadavg()[0], 1)}
        print(json.dumps(line), flush=True)

    quiet_s = time.monotonic()
    await asyncio.sleep(REST_S)  # before the first fault: what silences are without any
    rested_s = time.monotonic()
    await load.ended_since(rested_s)
    told({"fault": "none", "role": ""}, quiet_s, rested_s)
    for fault in args.faults:
        for role in args.roles or system.wanted.roles:
            epoch = (await load.epochs()).get(worker_name(role))
            start = time.monotonic()
            with hurt(system, role, fault):
                # A worker's supervisor starts it again at once; the others stay away for as long as a stop or a cut lasts.
                await asyncio.sleep(0.0 if fault == "kill" and role in (*WORKERS, "gateway") else args.seconds)
            ended = time.monotonic()
            while not await is_whole(load, system, role, fault, epoch):
                if time.monotonic() > ended + BACK_S:
                    raise SystemExit(f"{role} did not come back within {BACK_S:g} s of {fault}: {await load.epochs()}")
                await asyncio.sleep(0.1)
            back = time.monotonic()
            line: dict[str, Any] = {"fault": fault, "role": role, "lasted_s": round(ended - start, 2)}
            line["back_s"] = round(back - ended, 2)
            told(line if await load.ended_since(back) else {**line, "hung": True}, start, back)
    load.stopped = True
    _, hung = await asyncio.wait({running}, timeout=HANG_S)
    bad = [one.error for one in load.ended if one.error]
    total = {"num_streams": len(load.ended), "num_not_whole": len(bad), "num_hung": len(load.began_s) if hung else 0}
    how = {name: getattr(system.wanted, name) for name in ("num_ffn", "num_gateways", "store", "transport", "composition")}
    errors = {"errors": sorted(set(bad))[:9]} if bad else {}
    print(json.dumps({"bench": "faults", **how, **total, **errors, "cores": num_cores}))
    return len(bad) + int(total["num_hung"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=200, help="of a stream")
    parser.add_argument("--seconds", type=float, default=12.0, help="how long a stop or a cut lasts, and a killed store is away")
    parser.add_argument("--faults", nargs="+", choices=FAULTS, default=FAULTS)
    parser.add_argument("--roles", nargs="+", help="default: all that there are")
    parser.add_argument("--num-ffn", type=int, choices=(1, 2), default=2)
    parser.add_argument("--num-gateways", type=int, choices=(1, 2), default=2)
    parser.add_argument("--store", choices=("redis", "directory"), default="redis")
    parser.add_argument("--composition", action="store_true")
    parser.add_argument("--transport", choices=("grpc", "auto"), default="grpc")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    wanted = Wanted(
        num_streams=args.streams,
        num_ffn=args.num_ffn,
        num_gateways=args.num_gateways,
        store=args.store,
        transport=args.transport,
        composition=args.composition,
    )
    if unknown := set(args.roles or ()) - set(wanted.roles):
        parser.error(f"no such role here: {', '.join(sorted(unknown))}; there are {', '.join(wanted.roles)}")
    if not args.inside:
        os.execvp("unshare", ["unshare", "-n", sys.executable, __file__, "--inside", *sys.argv[1:]])
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended"))  # whoever ends it ends what it has started
    with tempfile.TemporaryDirectory(prefix="antiphon-faults-") as base:
        system = System(wanted, Path(base))
        try:
            system.start()
            num_bad = asyncio.run(measure(system, args))
        except BaseException:
            for log in sorted(Path(base).rglob("*.log")):
                print(f"--- the end of {log.name}", log.read_text(errors="replace")[-3000:], sep="\n", file=sys.stderr)
            raise
        finally:
            system.close()
    raise SystemExit(1 if num_bad else 0)


if __name__ == "__main__":
    main()
