"""Chat templates in a process of their own: the same text, and an end to those that have none."""

from __future__ import annotations

import asyncio
import time

import pytest

from antiphon.core.errors import CheckpointInvalid, InvalidInput
from antiphon.gateway.text.templates.chat_template import ChatTemplate
from antiphon.gateway.text.templates.template_process import TemplateProcess

GOOD = "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content | tojson }}\n{% endfor %}{% if think %}<think>{% endif %}"
CHAT = [{"role": "user", "content": "là-bas \ud83d 天🎵"}]
ENDLESS = {
    "nested ranges": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "a power": "{{ (10 ** (10 ** 8)) | string | length }}",
    "a long text": "{{ messages[0].role * 400000000 }}",
    "a constant": "{{ 'a' * 4000000000 }}",
    "centre": "{{ messages[0].role.center(4000000000) }}",
    "text after text": "{% for i in range(99999) %}{{ 'a' * 9999 }}{% endfor %}",
    "recursion": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
}


async def test_it_renders_what_the_template_renders() -> None:
    process = TemplateProcess({"m": (GOOD, {"bos_token": "<s>"})})
    try:
        found = await process.render("m", CHAT, add_generation_prompt=True, variables={"think": True})
    finally:
        await process.close()
    expected = ChatTemplate(GOOD, {"bos_token": "<s>"}).render(CHAT, add_generation_prompt=True, variables={"think": True})
    assert found == expected


async def test_templates_without_end_end_and_leave_the_loop_and_the_next_request_alone() -> None:
    templates: dict[str, tuple[str, dict[str, str]]] = {
        name: (source, {}) for name, source in ENDLESS.items() if name != "a constant"
    }
    process = TemplateProcess({"good": (GOOD, {}), **templates}, cpu_s=1.0)
    before_s = time.thread_time()
    try:
        for name in templates:
            with pytest.raises(InvalidInput):
                await process.render(name, CHAT, add_generation_prompt=True, variables={})
            assert await process.render("good", CHAT, add_generation_prompt=True, variables={})
    finally:
        await process.close()
    # Of the loop's own processor time, whatever else the machine does: a rendering on it would have had a second each.
    assert time.thread_time() - before_s < len(templates) / 2


@pytest.mark.parametrize("source", [ENDLESS["nested ranges"], ENDLESS["a constant"], "{{ messages | no_such_filter }}"])
async def test_a_template_that_can_not_render_a_first_chat_is_refused_at_the_start(source: str) -> None:
    process = TemplateProcess({"m": (source, {})}, cpu_s=1.0)
    try:
        with pytest.raises((CheckpointInvalid, InvalidInput)):
            await process.check()
    finally:
        await process.close()


async def test_a_template_that_wants_another_first_chat_is_taken() -> None:
    process = TemplateProcess({"m": ("{{ raise_exception('a system message comes first') }}", {})})
    try:
        await process.check()
        with pytest.raises(InvalidInput, match="a system message comes first"):
            await process.render("m", CHAT, add_generation_prompt=True, variables={})
    finally:
        await process.close()


async def test_a_caller_that_leaves_does_not_get_the_next_one_its_answer() -> None:
    process = TemplateProcess({"m": (GOOD, {}), "slow": (ENDLESS["nested ranges"], {})}, cpu_s=5.0)
    try:
        left = asyncio.create_task(process.render("slow", CHAT, add_generation_prompt=True, variables={}))
        await process.render("m", CHAT, add_generation_prompt=True, variables={}) if left.done() else None
        await asyncio.sleep(0)
        left.cancel()
        await asyncio.gather(left, return_exceptions=True)
        text = await process.render("m", [{"role": "user", "content": "second"}], add_generation_prompt=True, variables={})
        assert "second" in text
    finally:
        await process.close()
