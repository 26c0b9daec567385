"""Renders chat templates in a process of its own, within limits of time, memory and size (request speed).

Templates come with the weights. One that does not come to an end would hold every stream of the gateway, so it is rendered where it
can be ended; the next request starts the process again. Must not know: tokens, or requests.
"""

from __future__ import annotations

import asyncio
import json
import os
import struct
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Final

from antiphon.core.errors import CheckpointInvalid, InvalidInput, Unavailable
from antiphon.gateway.text.templates.template_child import MAX_MESSAGE_BYTES

CPU_S: Final = 2.0  # of one rendering
WALL_S: Final = 30.0  # of one rendering, the start of the process included, on a machine that does much else
_MEMORY_BYTES: Final = 512 * 2**20  # address space of the process
MAX_CHARS: Final = 16 * 2**20  # of one rendered text
_ENDLESS: Final = "the model's chat template takes more time or memory than it may"
_PROBE: Final = [{"role": "user", "content": "hello"}]
_CHILD: Final = "antiphon.gateway.text.templates.template_child"


class TemplateProcess:
    """The templates of one gateway. Belongs to one event loop; ``close`` is idempotent.

    Args:
        templates: source and special tokens by the model's name.
        cpu_s: processor time of one rendering.
    """

    def __init__(self, templates: Mapping[str, tuple[str, Mapping[str, str]]], *, cpu_s: float = CPU_S) -> None:
        self._templates = templates
        self._cpu_s = cpu_s
        self._process: asyncio.subprocess.Process | None = None
        self._loaded: set[str] = set()  # templates that the process has
        self._turn = asyncio.Lock()

    async def check(self) -> None:
        """Render a first chat with each template.

        Raises:
            CheckpointInvalid: one does not come to an end.
        """
        for name in self._templates:
            try:
                await self.render(name, _PROBE, add_generation_prompt=True, variables={})
            except (TemplateEndless, CheckpointInvalid) as error:
                raise CheckpointInvalid(f"model {name}: {error}") from error
            except InvalidInput:
                continue  # it wants another chat

    async def render(
        self,
        name: str,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool,
        variables: Mapping[str, Any],
        **further: Any,
    ) -> str:
        """The prompt's text.

        Raises:
            InvalidInput: the template refuses the messages, or does not come to an end with them.
            Unavailable: the process can't be started.
        """
        request = {
            "op": "render",
            "name": name,
            "messages": list(messages),
            "add_generation_prompt": add_generation_prompt,
            "variables": dict(variables),
            "further": further,
        }
        async with self._turn:
            process = await self._running()
            try:
                async with asyncio.timeout(WALL_S):
                    if name not in self._loaded:
                        source, special_tokens = self._templates[name]
                        load = {"op": "load", "name": name, "source": source, "special_tokens": dict(special_tokens)}
                        _check(await _ask(process, load))
                        self._loaded.add(name)
                    return str(_check(await _ask(process, request))["text"])
            except (InvalidInput, CheckpointInvalid):
                raise  # an answer, and the process goes on
            except (TimeoutError, asyncio.IncompleteReadError, ConnectionError) as error:
                await self._end()
                raise TemplateEndless(_ENDLESS, "messages") from error
            except BaseException:  # left in the middle: what it says next is nobody's answer
                await self._end()
                raise

    async def close(self) -> None:
        """End the process."""
        async with self._turn:
            await self._end()

    async def _running(self) -> asyncio.subprocess.Process:
        if self._process is not None and self._process.returncode is None:
            return self._process
        limits = json.dumps({"memory_bytes": _MEMORY_BYTES, "cpu_s": self._cpu_s, "max_chars": MAX_CHARS})
        environment = {name: os.environ[name] for name in ("PATH", "LANG", "LC_ALL", "TZ", "HOME") if name in os.environ}
        environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
        try:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                _CHILD,
                limits,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.DEVNULL,
                env=environment,
                start_new_session=True,  # Ctrl-C is the gateway's to handle
            )
        except OSError as error:
            raise Unavailable(f"the process for chat templates can't be started: {error}") from error
        self._process, self._loaded = process, set()
        return process

    async def _end(self) -> None:
        process, self._process = self._process, None
        if process is not None and process.returncode is None:
            process.kill()
            await process.wait()


class TemplateEndless(InvalidInput):
    """A rendering took more than it may."""


async def _ask(process: asyncio.subprocess.Process, request: Mapping[str, Any]) -> dict[str, Any]:
    assert process.stdin is not None
    assert process.stdout is not None
    data = json.dumps(request).encode()
    process.stdin.write(struct.pack(">I", len(data)) + data)
    await process.stdin.drain()
    (size,) = struct.unpack(">I", await process.stdout.readexactly(4))
    if size > MAX_MESSAGE_BYTES * 2:
        raise ConnectionError("an answer of an impossible size")
    answer: dict[str, Any] = json.loads(await process.stdout.readexactly(size))
    return answer


def _check(answer: dict[str, Any]) -> dict[str, Any]:
    match answer.get("kind"):
        case None:
            return answer
        case "limit":
            raise TemplateEndless(_ENDLESS, "messages")
        case "checkpoint":
            raise CheckpointInvalid(str(answer["error"]))
        case _:
            raise InvalidInput(str(answer["error"]), "messages")
