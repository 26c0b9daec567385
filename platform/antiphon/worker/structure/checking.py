"""Whether a grammar is affordable, found out in a process of its own that is killed when it takes too long (request speed).

Some grammars can't be compiled in any useful time or memory, and a compiler can't be interrupted. So a gateway compiles each new
one here first: the process has bounds on processor time and memory, and a worker only ever sees what has passed. A machine that is
too busy to give it that time says so, and nothing about the grammar.

    gateway ─► forker, which has imported everything ─► a fork per grammar: ends by itself, or by its timer

What people write takes a hundredth of the bound, so all begin in a quick lane with little time; what needs more waits in a lane of
its own, where it holds up its like alone. Must not know: requests.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import resource
import signal
import sys
from asyncio.subprocess import PIPE, Process
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from antiphon.core.errors import InvalidInput, Overloaded

BOUND = "bound: "  # begins a grammar's second line where that is its part without thoughts and free text
MAX_GRAMMAR_CHARS = 1_048_576
CHECK_TIMEOUT_S = 0.25  # of processor time
CHECK_WAIT_S = 10.0  # until a starved process has had that much
START_TIMEOUT_S = 20.0
MAX_MEMORY_BYTES = 2**30
STACK_BYTES = 2**20  # less than any thread's of a worker: what overflows does so here, where nobody else is
_QUICK_S: Final = 0.05  # of processor time, in the quick lane
_SURELY_S: Final = 0.12  # of processor time: on a busy machine so much is enough after _BUSY_S of the clock to say the same
_BUSY_S: Final = 0.6
_QUICK_AT_ONCE: Final = 2
_LONG_AT_ONCE: Final = min(3, max(1, (os.cpu_count() or 1) // 2))
_MAX_WAITING: Final = 64  # for the quick lane; a quarter of it for the other
_MAX_REMEMBERED: Final = 1024
_EXPENSIVE_FOR_S: Final = 60.0  # what was too expensive once is not tried again so soon
_NICE: Final = 5  # streams go first: about a quarter of a processor that others want too
_MAX_WHY_CHARS: Final = 500  # an answer is one write of less than PIPE_BUF, which no other writer's can tear apart


class TooExpensive(InvalidInput):
    """Compiling the grammar takes more than its bounds."""

    code = "structure_too_expensive"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Verdict:
    """What was found; ``why`` is None for what may be compiled. Too expensive counts until ``until_s`` of the loop's clock."""

    why: str | None
    until_s: float | None = None


class GrammarChecker:
    """Checks grammars; remembers the answers. Belongs to one event loop; ``close`` is idempotent."""

    def __init__(self) -> None:
        self._known: OrderedDict[bytes, _Verdict] = OrderedDict()
        self._running: dict[bytes, asyncio.Task[_Verdict]] = {}
        self._quick = _Lane(_QUICK_AT_ONCE, _MAX_WAITING)
        self._long = _Lane(_LONG_AT_ONCE, _MAX_WAITING // 4)
        self._forker = _Forker()
        self._ahead: asyncio.Task[Process] | None = None

    def start(self) -> None:
        """Begin to start the process, so that the first grammar need not wait; where that fails, that one tries again."""
        self._ahead = asyncio.create_task(self._forker.start())
        self._ahead.add_done_callback(_seen)

    async def check(self, grammar: str, field: str) -> None:
        """Return when a worker may compile ``grammar``.

        Raises:
            InvalidInput: it does not compile; ``field`` is named.
            TooExpensive: it takes too long or too much memory.
            Overloaded: too many are being checked, or the machine has no time for it.
        """
        if len(grammar) > MAX_GRAMMAR_CHARS:
            raise TooExpensive(f"{field}: it makes a grammar of {len(grammar)} characters, the limit is {MAX_GRAMMAR_CHARS}", field)
        key = hashlib.sha256(grammar.encode("utf-8", "surrogatepass")).digest()
        found = self._known.get(key)
        if found is not None and found.until_s is not None and found.until_s < asyncio.get_running_loop().time():
            found = None
        if found is None:
            found = await self._found(key, grammar)
        self._known.move_to_end(key)
        if found.until_s is not None:
            raise TooExpensive(f"{field}: {found.why}", field)
        if found.why is not None:
            raise InvalidInput(f"{field}: {found.why}", field)

    async def close(self) -> None:
        """End the processes."""
        tasks = [*self._running.values(), *([] if self._ahead is None else [self._ahead])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._forker.close()

    async def _found(self, key: bytes, grammar: str) -> _Verdict:
        """Ask once for all who want to know; a client that leaves leaves the process to its bounds, and its place in the lane."""
        task = self._running.get(key)
        if task is None:
            self._quick.check_room()
            task = self._running[key] = asyncio.create_task(self._ask(grammar))
            task.add_done_callback(_seen)
            task.add_done_callback(lambda _: self._running.pop(key))
        found = await asyncio.shield(task)
        self._known.pop(key, None)
        self._known[key] = found
        if len(self._known) > _MAX_REMEMBERED:
            self._known.popitem(last=False)
        return found

    async def _ask(self, grammar: str) -> _Verdict:
        async with self._quick:
            answer = await self._forker.ask(grammar, min(_QUICK_S, CHECK_TIMEOUT_S))
        if answer == -signal.SIGPROF:
            self._long.check_room()
            async with self._long:
                answer = await self._forker.ask(grammar, CHECK_TIMEOUT_S, _BUSY_S)
                if answer == -signal.SIGALRM:
                    answer = await self._forker.ask(grammar, _SURELY_S)
        match answer:
            case int() if answer == -signal.SIGALRM:
                raise Overloaded("the machine is too busy to check a schema or grammar", retry_after_s=1.0)
            case int() if answer == -signal.SIGPROF:
                why = f"compiling it takes longer than {CHECK_TIMEOUT_S} s, or half of that on a busy machine"
            case int():
                why = "compiling it takes too much memory, or nests too deeply"
            case _:
                return _Verdict(why=answer)
        return _Verdict(why=why, until_s=asyncio.get_running_loop().time() + _EXPENSIVE_FOR_S)


def _seen(task: asyncio.Task[Any]) -> None:
    """Nobody may be left to ask for the task's exception."""
    if not task.cancelled():
        task.exception()


class _Lane:
    """So many at once; others wait in order, few enough."""

    def __init__(self, at_once: int, max_waiting: int) -> None:
        self._slots = asyncio.Semaphore(at_once)
        self._max_waiting = max_waiting
        self._num_waiting = 0

    def check_room(self) -> None:
        """Raises Overloaded."""
        if self._num_waiting >= self._max_waiting:
            raise Overloaded("too many new schemas and grammars at once", retry_after_s=1.0)

    async def __aenter__(self) -> None:
        self._num_waiting += 1
        try:
            await self._slots.acquire()
        finally:
            self._num_waiting -= 1

    async def __aexit__(self, *_: object) -> None:
        self._slots.release()


class _Forker:
    """The process that forks one for each grammar; started when it isn't there."""

    def __init__(self) -> None:
        self._process: Process | None = None
        self._answers: dict[int, asyncio.Future[str | int | None]] = {}
        self._reading: asyncio.Task[None] | None = None
        self._starting = asyncio.Lock()
        self._num_asked = 0

    async def ask(self, grammar: str, cpu_s: float, wait_s: float | None = None) -> str | int | None:
        """What is wrong with a grammar, None for nothing, or minus the signal that ended its process: PROF at its bound.

        Raises:
            Overloaded: there is no process, or it has ended.
        """
        process = await self.start()
        assert process.stdin is not None
        wait = CHECK_WAIT_S if wait_s is None else min(wait_s, CHECK_WAIT_S)
        self._num_asked += 1
        number = self._num_asked
        answer = self._answers[number] = asyncio.get_running_loop().create_future()
        try:
            async with asyncio.timeout(CHECK_WAIT_S + START_TIMEOUT_S):
                process.stdin.write(f"{number} {cpu_s} {wait} {json.dumps(grammar)}\n".encode())
                await process.stdin.drain()
                found: str | int | None = await answer
                return found
        except (TimeoutError, ConnectionError) as error:
            if self._process is process:
                await self.close()
            raise Overloaded("the process that checks schemas and grammars does not answer", retry_after_s=1.0) from error
        finally:
            self._answers.pop(number, None)

    async def start(self) -> Process:
        """The process, started when it isn't there. Raises Overloaded."""
        async with self._starting:
            if self._process is not None and self._process.returncode is None:
                return self._process
            await self.close()
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                __name__,
                stdin=PIPE,
                stdout=PIPE,
                start_new_session=True,
                env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
            )
            self._process = process
            assert process.stdout is not None
            try:
                async with asyncio.timeout(START_TIMEOUT_S):
                    line = await process.stdout.readline()  # it has imported what it needs
            except (TimeoutError, asyncio.CancelledError) as error:
                await self.close()
                if isinstance(error, asyncio.CancelledError):
                    raise
                line = b""
            if not line:
                await self.close()
                raise Overloaded("the process that checks schemas and grammars does not start", retry_after_s=5.0)
            self._reading = asyncio.create_task(self._read(process.stdout))
            return process

    async def close(self) -> None:
        """End it; whoever waits for an answer is told. Idempotent."""
        process, self._process = self._process, None
        if process is not None:
            if process.returncode is None:
                process.kill()
            await process.wait()
        if self._reading is not None:
            self._reading.cancel()
        self._fail()

    async def _read(self, stream: asyncio.StreamReader) -> None:
        while line := await stream.readline():
            number, found = json.loads(line)
            answer = self._answers.get(number)
            if answer is not None and not answer.done():
                answer.set_result(found)
        self._fail()

    def _fail(self) -> None:
        for answer in self._answers.values():
            if not answer.done():
                answer.set_exception(ConnectionError("the process has ended"))


def main() -> None:
    """The forker: a number, bounds in seconds and a grammar per line in; the number and what is wrong, or who killed it, out."""
    from antiphon.worker.structure.grammar import why_invalid, why_unaffordable

    if hasattr(os, "SCHED_BATCH"):
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))  # never takes the processor from one that just woke up
    os.nice(_NICE)
    with contextlib.suppress(OSError):  # where a kernel weighs sessions, not processes, this one's own
        Path("/proc/self/autogroup").write_text(str(_NICE))
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_STACK, (STACK_BYTES, STACK_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    children: dict[int, int] = {}

    def tell(number: int, found: str | int | None) -> None:
        os.write(1, json.dumps([number, found]).encode() + b"\n")

    def ended(*_: object) -> None:
        while children:
            pid, status, used = os.wait4(-1, os.WNOHANG)
            if pid == 0:
                return
            number = children.pop(pid)
            code = os.waitstatus_to_exitcode(status)
            if code == -signal.SIGALRM and used.ru_utime + used.ru_stime >= _SURELY_S:
                code = -signal.SIGPROF
            if code != 0:
                tell(number, code)

    signal.signal(signal.SIGCHLD, ended)
    tell(0, None)
    for line in sys.stdin.buffer:
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCHLD])
        number, cpu_s, wait_s, text = line.split(b" ", 3)
        pid = os.fork()
        if pid == 0:
            signal.setitimer(signal.ITIMER_PROF, float(cpu_s))  # these signals end the process
            signal.setitimer(signal.ITIMER_REAL, float(wait_s))
            code = 1
            try:
                grammar = json.loads(text)
                why = why_invalid(grammar) or why_unaffordable(grammar)
                tell(int(number), why if why is None else why[:_MAX_WHY_CHARS])
                code = 0
            finally:
                os._exit(code)
        children[pid] = int(number)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGCHLD])


if __name__ == "__main__":
    main()
