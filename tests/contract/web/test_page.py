"""The page in a real browser, over a whole gateway: what somebody who opens it can do."""

from __future__ import annotations

import asyncio
import dataclasses
import importlib.util
import re
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from antiphon.core.ids import Endpoint, Role, WorkerId
from antiphon.rpc.services import RpcServer
from antiphon.rpc.steps import StepsServicer
from antiphon.telemetry.step_trace import Event, Mark, WorkerTrace

FOLDER = Path(__file__).parent


def _load(name: str, path: Path) -> Any:
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


browser = _load("web_browser", FOLDER / "browser.py")
fake = _load("doors_fake_engine", FOLDER.parent / "doors" / "fake_engine.py")

THOUGHT = "Hm, let me see."
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Où?"}}\n</tool_call>'
TEMPLATE = (
    "{% if tools %}<tools>{{ tools | tojson }}</tools>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function.name }} {{ c.function.arguments | tojson }}</tool_call>{% endfor %}"
    "<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% if enable_thinking is not defined or enable_thinking %}<think>\n"
    "{% else %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
ENTER = {"code": 13, "text": "\r"}
ESCAPE = {"code": 27}
ASSISTANT = "document.querySelector('.message.assistant:last-of-type')"
DONE = f"{ASSISTANT}?.getAttribute('aria-busy') === 'false'"


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with browser.Page(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@asynccontextmanager
async def answering(tmp_path: Path, page: Any, text: str, **options: Any) -> AsyncIterator[Any]:
    """A gateway whose model has tools and thoughts and always answers ``text``, its page open."""
    checkpoint = fake.make_checkpoint(tmp_path / "tokenizer")
    script = fake.Tokenizer.from_file(str(checkpoint / "tokenizer.json")).encode(text).ids
    await asyncio.to_thread(page.open, "about:blank")  # the page before asks for nothing more
    page.console.clear()
    page.requests.clear()
    async with fake.world(tmp_path, chat_template=TEMPLATE, script=script, max_model_len=4096, **options) as world:
        await asyncio.to_thread(page.open, world.url + "/")
        yield world
        # Nothing was asked for elsewhere, and the browser had nothing to complain of but answers that are errors.
        assert all(url.startswith(world.url) for url in page.requests), page.requests
        assert not [line for line in page.console if "responded with a status of 40" not in line], page.console


def by_hand(page: Any, text: str) -> None:
    """Write into the field that has the focus, and send it."""
    page.until("document.getElementById('model').value === 'tiny' && document.activeElement.id === 'prompt'")
    page.write(text)
    page.key("Enter", **ENTER)


async def test_thoughts_text_and_calls_stand_apart_and_a_result_goes_back(tmp_path: Path, page: Any) -> None:
    def use() -> None:
        page.until("document.getElementById('model').value === 'tiny'")
        page.run("document.getElementById('options').open = true; document.getElementById('sample-tool').click()")
        page.run("document.getElementById('prompt').focus()")
        by_hand(page, "what is <b>it</b>?")
        page.until(DONE)
        assert page.run("document.querySelector('.message.user').textContent") == "what is <b>it</b>?"
        assert page.run("document.querySelector('.thoughts div').textContent") == THOUGHT, page.text()
        assert page.run("document.querySelector('.thoughts').open") is False  # out of the way once there is an answer
        assert page.run("document.querySelector('.text').innerText") == "It is <i>weather</i>: `x`".replace("`", "")
        assert page.run("document.querySelector('.text code').textContent") == "x"
        assert page.run("document.querySelector('.call code').textContent") == "weather"
        assert "Où?" in page.run("document.querySelector('.call pre').textContent")
        assert page.run("document.activeElement.closest('.result') !== null")  # ready for the result
        page.write("rain")
        page.run("document.querySelector('.result').requestSubmit()")
        page.until(f"document.querySelectorAll('.message.assistant').length === 2 && {DONE}")
        assert "tokens read" in page.run("document.getElementById('said').textContent")

    async with answering(tmp_path, page, f"{THOUGHT}</think>\n\nIt is <i>weather</i>: `x`\n{CALL}") as world:
        await asyncio.to_thread(use)
        prompt = world.tokenizer.decode(list(world.engine.requests[-1].prompt_token_ids), skip_special_tokens=False)
        assert "<|im_start|>tool\nrain<|im_end|>" in prompt
        assert '<tool_call>weather {"city": "Où?"}</tool_call>' in prompt


async def test_what_is_sent_before_the_models_are_known_is_answered(tmp_path: Path, page: Any) -> None:
    def use() -> None:
        page.until("document.getElementById('model').value === 'tiny' && document.activeElement.id === 'prompt'")
        page.run("document.getElementById('model').replaceChildren()")  # as it is until the list has come
        page.write("hello")
        page.key("Enter", **ENTER)
        page.until(DONE)
        assert page.run("document.querySelector('.text').innerText") == "Well."

    async with answering(tmp_path, page, f"{THOUGHT}</think>\n\nWell."):
        await asyncio.to_thread(use)


async def test_escape_stops_and_the_engine_is_free_again(tmp_path: Path, page: Any) -> None:
    def use() -> None:
        by_hand(page, "go on")
        page.until("document.querySelector('.text')?.textContent.length > 20")
        assert page.run("document.getElementById('stop').hidden") is False
        page.key("Escape", **ESCAPE)
        page.until(DONE)
        assert "stopped" in page.run("document.querySelector('.facts').textContent")
        assert page.run("document.getElementById('send').hidden") is False

    async with answering(tmp_path, page, "</think>" + "la " * 2000, step_s=0.01) as world:
        await asyncio.to_thread(use)
        await fake.until(lambda: world.engine.num_live == 0)
        assert len(world.engine.aborted) == 1


async def test_a_key_is_asked_for_once_and_errors_are_shown(tmp_path: Path, page: Any) -> None:
    def use() -> None:
        page.until("!document.getElementById('key-form').hidden && document.activeElement.id === 'key'")
        assert "an API key is needed" in page.text()
        page.write("secret-1")
        page.key("Enter", **ENTER)
        page.until("document.getElementById('model').value === 'tiny'")
        assert page.run("document.getElementById('key-form').hidden")
        page.run("document.getElementById('temperature').value = '9'")
        by_hand(page, "what is it?")
        page.until(DONE)
        assert "temperature" in page.run("document.querySelector('.message .alert').textContent")
        page.run("document.getElementById('temperature').value = ''")
        by_hand(page, "what is it?")
        page.until(f"document.querySelectorAll('.message.assistant').length === 2 && {DONE}")
        assert page.run(f"{ASSISTANT}.querySelector('.text').textContent") == "ok"
        assert page.run("JSON.stringify(localStorage)").find("secret-1") == -1  # gone with the tab
        page.run("sessionStorage.clear()")

    async with answering(tmp_path, page, "</think>ok", gateway={"api_keys": frozenset({"secret-1"})}):
        await asyncio.to_thread(use)


async def test_the_picture_follows_the_workers_and_fits_a_telephone_in_both_colours(tmp_path: Path, page: Any) -> None:
    def look(expression: str) -> None:
        page.until(expression)

    def colours() -> list[str]:
        return [
            page.run("getComputedStyle(document.body).backgroundColor"),
            page.run("getComputedStyle(document.body).color"),
        ]

    def use() -> None:
        page.until("document.querySelectorAll('.worker').length === 2")
        light = colours()
        page.run("document.getElementById('theme').click(); document.getElementById('theme').click()")
        dark = colours()
        assert light != dark
        page.run("document.getElementById('theme').click()")
        assert colours() == light
        page.resize(360, 740)
        try:
            assert page.run("document.documentElement.scrollWidth") <= 360
            assert page.run("document.getElementById('live').offsetParent") is None
            page.run("document.getElementById('tab-chat').focus()")
            page.key("ArrowRight", code=39)
            assert page.run("document.activeElement.id") == "tab-live"
            assert page.run("document.getElementById('live').getBoundingClientRect().height > 100")
            assert page.run("document.documentElement.scrollWidth") <= 360
        finally:
            page.resize(1280, 860)

    async with answering(tmp_path, page, "</think>ok", workers=("0", "1")) as world:
        await asyncio.to_thread(use)
        load = dataclasses.replace(world.workers[1].info.load, num_running=7, num_waiting=3, num_free_blocks=25)
        await world.workers[1].register(load=load)
        await asyncio.to_thread(
            look,
            "[...document.querySelectorAll('.worker')].some((w) => /7 of 8[^]*75 of 100/.test(w.innerText))",
        )
        await world.workers[1].register(ready=False, message="waiting for FFN workers")
        await asyncio.to_thread(look, "document.getElementById('health-text').textContent === '1 of 2 workers ready'")
        await asyncio.to_thread(look, "document.querySelector('.worker .why')?.textContent === 'waiting for FFN workers'")


class Recorder:
    """A worker that always did the same two layers in two ubatches; its FFN worker's clock is 500 s ahead."""

    def __init__(self, role: str) -> None:
        self.role = role

    async def trace_steps(self, seconds: float) -> WorkerTrace:
        events = []
        for number in range(4):
            layer, ubatch = divmod(number, 2)
            at = 0.001 * number
            common: dict[str, Any] = {"step": 9, "layer": layer, "ubatch": ubatch, "rows": 3}
            if self.role == "attention":
                events += [
                    Event(mark=Mark.ATTEND, start_s=at, end_s=at + 0.0009, **common),
                    Event(mark=Mark.SEND, start_s=at + 0.0009, end_s=at + 0.001, **common),
                    Event(mark=Mark.RECEIVE, start_s=at + 0.0018, end_s=at + 0.002, **common),
                ]
            else:
                events += [
                    Event(mark=Mark.ROWS, start_s=500 + at + 0.001, end_s=500 + at + 0.0018, peer="demo/attention/0", **common),
                    Event(mark=Mark.COMPUTE, start_s=500 + at + 0.0011, end_s=500 + at + 0.0019, layer=layer, rows=3),
                ]
        if self.role == "attention":
            events.append(Event(mark=Mark.STEP, start_s=0.0, end_s=0.006, step=9, rows=6))
        return WorkerTrace(worker=f"demo/{self.role}/0", role=self.role, pid=1, events=tuple(events))


async def test_a_traced_step_is_drawn_with_both_sides_on_one_time_line(tmp_path: Path, page: Any) -> None:
    def use() -> None:
        page.until("document.querySelectorAll('.worker').length === 3")
        page.run("document.getElementById('trace').click()")
        page.until("document.querySelectorAll('#step-picture svg').length > 1")
        note = page.run("document.getElementById('step-note').textContent")
        assert note.startswith("Step 9: 6.00 ms for 6 rows in 2 ubatches over 2 layers."), note
        page.run("document.getElementById('step-whole').click()")
        big = "document.querySelector('#step-picture svg[role=img]')"
        for kind, number in ((".attend", 4), (".attend.odd", 2), (".compute", 4), (".compute.odd", 2), (".away", 8)):
            assert page.run(f"{big}.querySelectorAll('{kind}').length") == number, kind
        titles = page.run(f"[...{big}.querySelectorAll('title')].map((t) => t.textContent)")
        assert "FFN, layer 1, ubatch 0: 800 µs, 3 rows" in titles
        # Attention of ubatch 1 lies beside the FFN of ubatch 0: that is the point of two.
        boxes = f"[{big}.querySelector('.attend.odd'), {big}.querySelector('.compute')].map((b) => b.getBoundingClientRect())"
        assert page.run(f"(([a, f]) => a.left < f.right && f.left < a.right)({boxes})")

    servers = []
    async with answering(tmp_path, page, "</think>ok") as world:
        for role in ("attention", "ffn"):
            server = RpcServer([StepsServicer(Recorder(role))], host="127.0.0.1")
            await server.start()
            servers.append(server)
            worker_id = WorkerId(f"demo/{role}/0")
            endpoint = Endpoint(rpc=server.address)
            record = dataclasses.replace(
                world.workers[0].info, worker_id=worker_id, pool=role, role=Role(role), endpoint=endpoint, model="other"
            )
            await world.directory.register(record, 60.0)
        try:
            await asyncio.to_thread(use)
        finally:
            for server in servers:
                await server.close()


async def test_the_files_say_what_a_browser_may_do_and_are_kept_by_it(tmp_path: Path) -> None:
    async with fake.world(tmp_path) as world, httpx.AsyncClient(base_url=world.url, trust_env=False) as client:
        first = await client.get("/")
        assert first.headers["content-type"] == "text/html; charset=utf-8"
        policy = dict(part.split(" ", 1) for part in first.headers["content-security-policy"].split("; "))
        assert policy["default-src"] == "'none'"
        assert policy["script-src"] == policy["connect-src"] == policy["style-src"] == "'self'"
        again = await client.get("/", headers={"if-none-match": first.headers["etag"]})
        assert (again.status_code, again.content) == (304, b"")
        # Every file of the page is there, and none carries code of its own that the policy would stop.
        for name in set(re.findall(r'(?:src|href)="(web/[^"]+)"', first.text)):
            part = await client.get(f"/{name}")
            assert part.status_code == 200, name
            assert part.headers["x-content-type-options"] == "nosniff"
        assert "<style" not in first.text
        assert not re.search(r'\son[a-z]+="|style="|https?://', first.text)
        for lost in ("/web/none.js", "/web/..%2Froutes.py", "/web/routes.py"):
            assert (await client.get(lost)).status_code == 404
