"""Answers as models write them, by format: spelled out by hand, as model cards and templates have them, not by our own writers.

Arguments hold what parsers stumble over: other formats' marks, quotes, braces, line ends, characters of several bytes. A format
without an answer here fails the tests.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

Call = tuple[str, dict[str, Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Recorded:
    """What a model wrote, and what it means."""

    raw: str
    calls: tuple[Call, ...]
    thought: str = "Hm, 天気 🎵?"
    text: str = "I look."
    reasoning: str = "think"


CITY = 'Orléans "{[天]}" 🎵\nend'
CALLS: tuple[Call, ...] = (("weather", {"city": CITY, "days": 3, "where": {"a": "}</x>", "b": [1, {"c": None}]}}), ("now", {}))
PLAIN: tuple[Call, ...] = (("weather", {"city": "Orléans & <b> 天 🎵", "days": -3, "sure": True}), ("now", {}))
CITY_JSON = '"Orl\\u00e9ans \\"{[天]}\\" 🎵\\nend"'
ARGUMENTS = '{"city": ' + CITY_JSON + ', "days": 3, "where": {"a": "}</x>", "b": [1, {"c": null}]}}'
THOUGHT = "<think>\nHm, 天気 🎵?\n</think>\n\n"

RECORDED: dict[str, Recorded] = {
    "hermes": Recorded(
        raw=f'{THOUGHT}I look.\n<tool_call>\n{{"name": "weather", "arguments": {ARGUMENTS}}}\n</tool_call>\n'
        '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>',
        calls=CALLS,
    ),
    "qwen3_coder": Recorded(
        raw=f"{THOUGHT}I look.\n\n<tool_call>\n<function=weather>\n<parameter=city>\nOrléans & <b> 天 🎵\n</parameter>\n"
        "<parameter=days>\n-3\n</parameter>\n<parameter=sure>\ntrue\n</parameter>\n</function>\n</tool_call>\n"
        "<tool_call>\n<function=now>\n</function>\n</tool_call>",
        calls=PLAIN,
    ),
    "glm": Recorded(
        raw=f"{THOUGHT}I look.\n<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>Orléans & <b> 天 🎵</arg_value>\n"
        "<arg_key>days</arg_key>\n<arg_value>-3</arg_value>\n<arg_key>sure</arg_key>\n<arg_value>true</arg_value>\n</tool_call>\n"
        "<tool_call>now\n</tool_call>",
        calls=PLAIN,
    ),
    "step3": Recorded(
        raw=f"{THOUGHT}I look.\n<｜tool_calls_begin｜><｜tool_call_begin｜>function<｜tool_sep｜>"
        '<steptml:invoke name="weather"><steptml:parameter name="city">Orléans & <b> 天 🎵</steptml:parameter>'
        '<steptml:parameter name="days">-3</steptml:parameter><steptml:parameter name="sure">true</steptml:parameter>'
        "</steptml:invoke><｜tool_call_end｜><｜tool_call_begin｜>function<｜tool_sep｜>"
        '<steptml:invoke name="now"></steptml:invoke><｜tool_call_end｜><｜tool_calls_end｜>',
        calls=PLAIN,
    ),
    "deepseek_v3": Recorded(
        raw=f"{THOUGHT}I look.<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n```json\n{ARGUMENTS}\n```"
        "<｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>function<｜tool▁sep｜>now\n```json\n{}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
        calls=CALLS,
    ),
    "deepseek_v31": Recorded(
        raw=f"{THOUGHT}I look.<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>weather<｜tool▁sep｜>{ARGUMENTS}<｜tool▁call▁end｜>"
        "<｜tool▁call▁begin｜>now<｜tool▁sep｜>{}<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
        calls=CALLS,
    ),
    "mistral": Recorded(
        raw=f'{THOUGHT}I look.[TOOL_CALLS][{{"name": "weather", "arguments": {ARGUMENTS}}}, {{"name": "now", "arguments": {{}}}}]',
        calls=CALLS,
    ),
    "mistral_args": Recorded(
        raw=f"[THINK]Hm, 天気 🎵?[/THINK]I look.[TOOL_CALLS]weather[ARGS]{ARGUMENTS}[TOOL_CALLS]now[ARGS]{{}}",
        calls=CALLS,
        reasoning="mistral",
    ),
    "llama3_json": Recorded(
        raw=f'<|python_tag|>{{"name": "weather", "parameters": {ARGUMENTS}}}; {{"name": "now", "parameters": {{}}}}',
        calls=CALLS,
        thought="",
        text="",
        reasoning="none",
    ),
    "harmony": Recorded(
        raw="<|channel|>analysis<|message|>Hm, 天気 🎵?<|end|><|start|>assistant<|channel|>commentary<|message|>I look.<|end|>"
        f"<|start|>assistant<|channel|>commentary to=functions.weather <|constrain|>json<|message|>{ARGUMENTS}",
        calls=CALLS[:1],
        reasoning="harmony",
    ),
}
