"""Renders chat messages with a checkpoint's Jinja template, as transformers' apply_chat_template does (request speed).

Templates come with the weights and are run in Jinja's sandbox. Must not know: tokens.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from antiphon.core.errors import CheckpointInvalid, InvalidInput


class ChatTemplate:
    """One template. Rendering is thread-safe.

    Args:
        source: the template.
        special_tokens: variables such as bos_token and eos_token.

    Raises:
        CheckpointInvalid: the template does not parse.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, jinja2.ext.loopcontrols]
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        try:
            environment.parse(source)  # compiling it also computes what is constant in it, which may take for ever
        except jinja2.TemplateSyntaxError as error:
            raise CheckpointInvalid(f"chat template, line {error.lineno}: {error.message}") from error
        except (RecursionError, ValueError, ArithmeticError) as error:
            raise CheckpointInvalid(f"chat template: {error}") from error
        self._environment = environment
        self._template: jinja2.Template | None = None
        self.source = source
        self.special_tokens = dict(special_tokens)

    def compile(self) -> None:
        """Compile it now rather than with the first chat.

        Raises:
            CheckpointInvalid: it can't be compiled.
        """
        try:
            self._compiled()
        except jinja2.TemplateSyntaxError as error:
            raise CheckpointInvalid(f"chat template, line {error.lineno}: {error.message}") from error

    def _compiled(self) -> jinja2.Template:
        if self._template is None:
            self._template = self._environment.from_string(self.source)
        return self._template

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool,
        variables: Mapping[str, Any],
        max_chars: int | None = None,
    ) -> str:
        """The prompt's text.

        Args:
            messages: each with role and content.
            add_generation_prompt: end with the beginning of the assistant's answer.
            variables: further variables of the template, e.g. tools and enable_thinking.
            max_chars: longest text to make; None = any.

        Raises:
            InvalidInput: the template refuses the messages.
        """
        context = {
            **self.special_tokens,
            **variables,
            "messages": [dict(message) for message in messages],
            "tools": variables.get("tools"),
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            template = self._compiled()
            if max_chars is None:
                return template.render(context)
            parts, num_chars = [], 0
            for part in template.generate(context):
                num_chars += len(part)
                if num_chars > max_chars:
                    raise InvalidInput(f"the model's chat template makes more than {max_chars} characters", "messages")
                parts.append(part)
            return "".join(parts)
        except jinja2.TemplateError as error:
            raise InvalidInput(f"the model's chat template refuses the messages: {error}", "messages") from error
        except (TypeError, ValueError, LookupError, ArithmeticError, AttributeError, RecursionError) as error:
            raise InvalidInput(f"the model's chat template can't render the messages: {error}", "messages") from error


class _GenerationBlock(jinja2.ext.Extension):
    """{% generation %} ... {% endgeneration %} marks the assistant's words for training; here it is only its content."""

    tags = {"generation"}  # noqa: RUF012 - jinja2's interface

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes for HTML.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _strftime_now(form: str) -> str:
    return datetime.datetime.now().strftime(form)
