"""What a chat may do besides talking: tools, a shape its answer must have, thinking (values; request speed).

Must not know: the doors that ask for it, or the formats models write it in.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

ToolChoice = Literal["none", "auto", "required"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolCall:
    """A call in the history: ``arguments`` is JSON as the model wrote it."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Tool:
    """A function that the model may call; ``parameters`` is the JSON schema of its arguments.

    ``is_custom``: its one argument is a text, and what the client gets; ``grammar``: Lark that the text follows.
    """

    name: str
    description: str | None = None
    parameters: Mapping[str, Any] = field(default_factory=lambda: {"type": "object", "properties": {}})
    strict: bool = False
    is_custom: bool = False
    grammar: str | None = None
    field: str = "tools"

    def as_openai(self) -> dict[str, Any]:
        """As chat templates read it."""
        described = {} if self.description is None else {"description": self.description}
        return {"type": "function", "function": {"name": self.name, **described, "parameters": dict(self.parameters)}}


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerShape:
    """What the answer must be: ``value`` is a schema, a pattern, a list of texts or a grammar. ``field`` is where it was asked."""

    kind: Literal["json_object", "json_schema", "regex", "choice", "grammar"]
    value: Any = None
    field: str = "response_format"
    white_space: str | None = None  # a pattern of what stands between JSON's parts; None = a little
    closes_objects: bool = False  # those of a schema have no properties but the named ones, unless it says more


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatOptions:
    """Tools, shape and thinking of one request."""

    tools: tuple[Tool, ...] = ()
    tool_choice: ToolChoice = "auto"
    tool_names: tuple[str, ...] | None = None  # of tools that this answer may call; None = all
    parallel_tool_calls: bool = True
    shape: AnswerShape | None = None
    thinking: bool | None = None  # None = as the template does by itself
    effort: str | None = None
    thinking_budget: int | None = None  # tokens of thought; None = no bound
    thinking_field: str = "thinking_budget"  # where the bound was asked for
    effort_field: str = "reasoning_effort"  # where thinking was
    tool_choice_field: str = "tool_choice"

    @property
    def callable_tools(self) -> tuple[Tool, ...]:
        """Tools that this answer may call."""
        if self.tool_choice == "none":
            return ()
        return tuple(tool for tool in self.tools if self.tool_names is None or tool.name in self.tool_names)
