"""Whether a grammar is affordable, found out in a process of its own that is killed when it takes too long (request speed).

Some grammars can't be compiled in any useful time or memory, and a compiler can't be interrupted. So a gateway compiles each new
one here first: the process has bounds on processor time and memory, and a worker only ever sees what has passed. A machine that is
too busy to give it that time says so, and nothing about the grammar. Must not know: requests.
"""

from __future__ import annotations

import asyncio
import json
import resource
import signal
import sys
from asyncio.subprocess import PIPE, Process
from collections import OrderedDict

from antiphon.core.errors import InvalidInput, Overloaded

BOUND = "bound: "  # begins a grammar's second line where that is its part without thoughts and free text
MAX_GRAMMAR_CHARS = 1_048_576
CHECK_TIMEOUT_S = 0.8  # of processor time
CHECK_WAIT_S = 10.0  # until a starved process has had that much
START_TIMEOUT_S = 20.0
MAX_MEMORY_BYTES = 2**30
STACK_BYTES = 2**20  # less than any thread's of a worker: what overflows does so here, where nobody else is
_MAX_PROCESSES = 3
_MAX_WAITING = 64
_MAX_REMEMBERED = 1024
_MAX_LINE_BYTES = 8 * 2**20


class TooExpensive(InvalidInput):
    """Compiling the grammar takes more than its bounds."""

    code = "structure_too_expensive"


class GrammarChecker:
    """Checks grammars; remembers the answers. Belongs to one event loop; ``close`` is idempotent."""

    def __init__(self) -> None:
        self._known: OrderedDict[str, str | None] = OrderedDict()
        self._idle: list[Process] = []
        self._all: set[Process] = set()
        self._slots = asyncio.Semaphore(_MAX_PROCESSES)
        self._num_waiting = 0

    async def check(self, grammar: str, field: str) -> None:
        """Return when a worker may compile ``grammar``.

        Raises:
            InvalidInput: it does not compile; ``field`` is named.
            TooExpensive: it takes too long or too much memory.
            Overloaded: too many are being checked, or the machine has no time for it.
        """
        if len(grammar) > MAX_GRAMMAR_CHARS:
            raise TooExpensive(f"{field}: it makes a grammar of {len(grammar)} characters, the limit is {MAX_GRAMMAR_CHARS}", field)
        if grammar in self._known:
            self._known.move_to_end(grammar)
            why = self._known[grammar]
        else:
            why = await self._ask(grammar, field)
            self._known[grammar] = why
            if len(self._known) > _MAX_REMEMBERED:
                self._known.popitem(last=False)
        if why is not None:
            raise InvalidInput(f"{field}: {why}", field)

    async def close(self) -> None:
        """End the processes."""
        for process in list(self._all):
            await self._end(process)

    async def _ask(self, grammar: str, field: str) -> str | None:
        if self._num_waiting >= _MAX_WAITING:
            raise Overloaded("too many new schemas and grammars at once", retry_after_s=1.0)
        self._num_waiting += 1
        try:
            await self._slots.acquire()
        finally:
            self._num_waiting -= 1
        process: Process | None = None
        try:
            process = self._idle.pop() if self._idle else await self._start()
            assert process.stdin is not None
            assert process.stdout is not None
            async with asyncio.timeout(CHECK_WAIT_S):
                process.stdin.write(json.dumps(grammar).encode() + b"\n")
                await process.stdin.drain()
                line = await process.stdout.readline()
                if not line and await process.wait() == -signal.SIGPROF:
                    raise TooExpensive(f"{field}: compiling it takes longer than {CHECK_TIMEOUT_S} s", field)
            if not line:
                raise TooExpensive(f"{field}: compiling it takes too much memory, or nests too deeply", field)
            why: str | None = json.loads(line)
        except TimeoutError as error:
            raise Overloaded(f"{field}: the machine is too busy to check it", retry_after_s=1.0) from error
        except ConnectionError as error:
            raise Overloaded(f"{field}: the process that checks it has ended", retry_after_s=1.0) from error
        else:
            self._idle.append(process)
            process = None
            return why
        finally:
            if process is not None:
                await self._end(process)
            self._slots.release()

    async def _start(self) -> Process:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", __name__, stdin=PIPE, stdout=PIPE, limit=_MAX_LINE_BYTES
        )
        self._all.add(process)
        assert process.stdout is not None
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                await process.stdout.readline()  # it has imported what it needs
        except TimeoutError as error:
            await self._end(process)
            raise Overloaded("the process that checks grammars does not start", retry_after_s=5.0) from error
        return process

    async def _end(self, process: Process) -> None:
        self._all.discard(process)
        if process in self._idle:
            self._idle.remove(process)
        if process.returncode is None:
            process.kill()
        await process.wait()


def main() -> None:
    """The checking process: a grammar per line in, what is wrong with it out."""
    from antiphon.worker.structure.grammar import why_invalid, why_unaffordable

    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_STACK, (STACK_BYTES, STACK_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    print("null", flush=True)  # noqa: T201 - the pipe to the gateway
    for line in sys.stdin:
        grammar = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, CHECK_TIMEOUT_S)  # its signal ends the process
        why = why_invalid(grammar) or why_unaffordable(grammar)
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps(why), flush=True)  # noqa: T201 - as above


if __name__ == "__main__":
    main()
