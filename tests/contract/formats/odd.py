"""Answers that models write when they do not keep to their format, or to nothing at all, and what they mean.

Each is (format, what was written, text, calls, whether all calls are whole). Arguments are JSON where a call is whole.
"""

from __future__ import annotations

from typing import Any

Odd = tuple[str, str, str, list[tuple[str, Any]], bool]

OSLO: tuple[str, Any] = ("weather", {"city": "Oslo"})
NOW: tuple[str, Any] = ("now", {})
_ALL, _ALL_END, _ONE = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>", "<｜tool▁call▁begin｜>"
_ONE_END, _SEP = "<｜tool▁call▁end｜>", "<｜tool▁sep｜>"


def hermes(body: str) -> str:
    """A call as Hermes marks it."""
    return f"<tool_call>\n{body}\n</tool_call>"


def coder(body: str, name: str = "weather") -> str:
    """A call as Qwen3-Coder marks it."""
    return f"<tool_call>\n<function={name}>\n{body}</function>\n</tool_call>"


def parameter(name: str, value: str) -> str:
    """One of its parameters."""
    return f"<parameter={name}>\n{value}\n</parameter>\n"


_NOW = hermes('{"name": "now"}')
ODD: list[Odd] = [
    # What JSON's texts have no place for is written so that they have.
    ("hermes", hermes('{"name": "weather", "arguments": {"city": "a\nb\tc"}}'), "", [("weather", {"city": "a\nb\tc"})], True),
    ("hermes", hermes('{"name": "weather", "arguments": {"city": "it\\\'s \\d"}}'), "", [("weather", {"city": "it's \\d"})], True),
    ("hermes", hermes('{"name": "weather", "arguments": {"city": "\\ud83c\\udfb5\\\\"}}'), "",
     [("weather", {"city": "🎵\\"})], True),
    # No arguments, said in several ways.
    *(("hermes", hermes('{"name": "now"' + said), "", [NOW], True) for said in ("}", ', "arguments": null}', ', "arguments": ""}')),
    # Braces too few and too many; marks left out.
    ("hermes", '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}\n</tool_call> So.', "So.", [OSLO], True),
    ("hermes", '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}}}\n</tool_call> So.', "So.", [OSLO], True),
    ("hermes", '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}', "", [OSLO], True),
    ("hermes", hermes('{"name": "weather", "arguments": {"city": "Oslo"}}\n{"name": "now"}'), "", [OSLO, NOW], True),
    ("hermes", '<tool_call>{"name": "now"} and so on {', "and so on {", [NOW], True),
    # Text around calls: what stood between stays, once; a line's end where nothing stood.
    ("hermes", f"I look.\n\n{_NOW}\nDone.", "I look.\n\nDone.", [NOW], True),
    ("hermes", f"I look.{_NOW} Done.", "I look. Done.", [NOW], True),
    ("hermes", f"I look.{_NOW}Done.", "I look.\nDone.", [NOW], True),
    ("hermes", f"I look.\n{_NOW}\n\n{_NOW}Done. Yes.", "I look.\nDone. Yes.", [NOW, NOW], True),
    # Ended inside.
    ("hermes", '<tool_call>\n{"name": "weather", "arguments": {"ci', "", [("weather", '{"ci')], False),
    ("hermes", '<tool_call>\n{"na', '<tool_call>\n{"na', [], True),
    ("hermes", "<tool_call>", "<tool_call>", [], True),
    # No calls, whatever they look like.
    ("hermes", hermes("weather"), hermes("weather"), [], True),
    ("hermes", "text <tool_cal", "text <tool_cal", [], True),
    ("hermes", hermes('{"name": "weather", "arguments": {"city": "</tool_call><tool_call>"}}'), "",
     [("weather", {"city": "</tool_call><tool_call>"})], True),
    # A value's type is the schema's, not what it looks like.
    ("qwen3_coder", coder(parameter("code", "0123") + parameter("place", "42") + parameter("level", "2")), "",
     [("weather", {"code": "0123", "place": "42", "level": "2"})], True),
    ("qwen3_coder", coder(parameter("place", "null") + parameter("level", "low")), "",
     [("weather", {"place": None, "level": "low"})], True),
    ("qwen3_coder", coder(parameter("sure", "True") + parameter("where", '{"a": "x\ny"}')), "",
     [("weather", {"sure": True, "where": {"a": "x\ny"}})], True),
    ("qwen3_coder", coder(parameter("days", "NaN")), "", [("weather", {"days": "NaN"})], True),
    ("qwen3_coder", coder(parameter("city", "<tool_call> </function> {")), "",
     [("weather", {"city": "<tool_call> </function> {"})], True),
    # As Python writes values, and numbers that JSON has not; a letter of a word may be any text's.
    ("hermes", hermes('{"name": "weather", "arguments": {"sure": True, "a": [None, {"b": False}], "days": NaN, "c": "None"}}'), "",
     [("weather", {"sure": True, "a": [None, {"b": False}], "days": None, "c": "None"})], True),
    ("hermes", hermes('{"name": "weather", "arguments": {"days": -3, "a": -Infinity, "b": 1E5}}'), "",
     [("weather", {"days": -3, "a": None, "b": 1e5})], True),
    ("qwen3_coder", coder(parameter("where", "{'a': True, 'b': (1, None)}") + parameter("city", "{'a': 1}")), "",
     [("weather", {"where": {"a": True, "b": [1, None]}, "city": "{'a': 1}"})], True),
    ("qwen3_coder", coder(parameter("where", "{'a': open}") + parameter("days", "1e999")), "",
     [("weather", {"where": "{'a': open}", "days": "1e999"})], True),
    # Halves of characters: kept escaped in arguments, no name has one.
    ("hermes", hermes('{"name": "weather", "arguments": {"city": "\\ud83c"}}'), "", [("weather", {"city": "\ud83c"})], True),
    ("qwen3_coder", coder(parameter("where", '{"a": "\\udfb5 天"}')), "", [("weather", {"where": {"a": "\udfb5 天"}})], True),
    ("hermes", hermes('{"name": "\\ud83c"}'), hermes('{"name": "\\ud83c"}'), [], True),
    # Keys and names written with escapes; the same key twice; arguments before the name, and as a text of JSON.
    ("hermes", hermes('{"n\\u0061me": "weath\\u0065r", "arguments": {"city": "Oslo"}}'), "", [OSLO], True),
    ("hermes", hermes('{"arguments": "{\\"city\\": \\"Oslo\\"}", "name": "weather"}'), "", [OSLO], True),
    ("hermes", hermes('{"name": "now", "name": "weather", "arguments": {}, "arguments": {"a": 1}}'), "", [NOW], True),
    # Marks within texts, and a thought's marks outside of one.
    ("hermes", hermes('{"name": "weather", "arguments": {"city": "</think> \\" }} </tool_call>\\\\"}}'), "",
     [("weather", {"city": '</think> " }} </tool_call>\\'})], True),
    ("hermes", f"So: </think> {_NOW}", "So: </think>", [NOW], True),
    ("deepseek_v31", f"{_ALL}{_ONE}weather{_SEP}{{\"city\": \"{_ONE_END}{_ALL_END}\"}}{_ONE_END}{_ALL_END}", "",
     [("weather", {"city": _ONE_END + _ALL_END})], True),
    ("mistral_args", '[TOOL_CALLS]weather[ARGS]{"city": "[TOOL_CALLS]now[ARGS]{}"}[TOOL_CALLS]now[ARGS]{}', "",
     [("weather", {"city": "[TOOL_CALLS]now[ARGS]{}"}), NOW], True),
    ("glm", "<tool_call>weather\n<arg_key>where</arg_key>\n<arg_value>[1, {\"a\": \"</x>\"}]</arg_value>\n</tool_call>", "",
     [("weather", {"where": [1, {"a": "</x>"}]})], True),
    ("qwen3_coder", coder(parameter("city", "") + parameter("days", " 3 ")), "", [("weather", {"city": "", "days": 3})], True),
    ("qwen3_coder", coder("", "now") + coder("", "now") + " So.", "So.", [NOW, NOW], True),
    # White space and closing marks left out.
    ("qwen3_coder", "<tool_call><function=weather><parameter=city>Oslo</parameter></function></tool_call>So.", "So.", [OSLO], True),
    ("qwen3_coder", "<tool_call>\n<function=weather>\n<parameter=city>\nOslo\n</parameter>\n</function>\nSo.", "So.", [OSLO], True),
    ("qwen3_coder", "<tool_call>\n<function=now>\n</tool_call>So.", "So.", [NOW], True),
    ("qwen3_coder", "<tool_call>\n<function=weather>\n<parameter=city>\nOs", "", [("weather", "")], False),
    ("glm", "<tool_call>weather<arg_key>city</arg_key><arg_value>Oslo</arg_value></tool_call>", "", [OSLO], True),
    ("glm", "<tool_call>\nweather\n<arg_key>city</arg_key>\n<arg_value>Oslo</arg_value>\n</tool_call>So.", "So.", [OSLO], True),
    ("glm", "<tool_call>now</tool_call>", "", [NOW], True),
    ("glm", hermes('{"name": "now"}'), hermes('{"name": "now"}'), [], True),
    # Lists without a call, calls without arguments.
    ("deepseek_v3", f"{_ALL}{_ALL_END}So.", "So.", [], True),
    ("deepseek_v3", f"{_ALL}{_ONE}function{_SEP}now\n```json\n\n```{_ONE_END}{_ALL_END}", "", [NOW], True),
    ("deepseek_v31", f"{_ALL}{_ONE}now{_SEP}{_ONE_END}{_ONE}now{_SEP}null{_ONE_END}{_ALL_END}", "", [NOW, NOW], True),
    ("deepseek_v31", f"{_ALL}{_ONE}now{_SEP}oh{_ONE_END}{_ALL_END}", f"{_ALL}{_ONE}now{_SEP}oh{_ONE_END}{_ALL_END}", [], True),
    ("mistral", "[TOOL_CALLS][]So.", "So.", [], True),
    ("mistral", '[TOOL_CALLS] {"name": "now", "arguments": {}}', "", [NOW], True),
    ("mistral", '[TOOL_CALLS][{"name": "now", "arguments": {}}, {"name"', '{"name"', [NOW], True),
    ("mistral", '[TOOL_CALLS][{"name": "weather", "arguments": {"city": "Oslo"}]So.', "So.", [OSLO], True),
    ("llama3_json", '{"name": "weather", "parameters": {"city": "Oslo"}', "", [OSLO], True),
    *(("llama3_json", f'{{"name": "now", "parameters": null}}{mark}{{"name": "now"}}', "", [NOW, NOW], True)
      for mark in ("", "\n", ", ", "; ")),
    ("llama3_json", '{"name": "now", "parameters": {}} {"a": 1}', '{"a": 1}', [NOW], True),
]  # fmt: skip
