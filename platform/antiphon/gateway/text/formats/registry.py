"""Every format of calls and of thoughts by name, and which one a chat template asks for (request speed).

A new one: a file beside this, a line here, its name in the document's ``toolFormat`` or ``reasoningFormat``.
Must not know: requests.
"""

from __future__ import annotations

from antiphon.core.errors import CheckpointInvalid
from antiphon.gateway.text.formats.base import CallFormat, ChannelFormat, ThoughtMarkers
from antiphon.gateway.text.formats.deepseek import DeepSeekV3Format, DeepSeekV31Format
from antiphon.gateway.text.formats.harmony import HARMONY_THOUGHTS, HarmonyFormat
from antiphon.gateway.text.formats.hermes import HermesFormat
from antiphon.gateway.text.formats.llama3 import Llama3Format
from antiphon.gateway.text.formats.mistral import MistralArgsFormat, MistralFormat
from antiphon.gateway.text.formats.tagged import GlmFormat, Qwen3CoderFormat, Step3Format

# In the order in which templates are looked at: the more particular first.
CALL_FORMATS: tuple[CallFormat, ...] = (
    HarmonyFormat(),
    Step3Format(),
    Qwen3CoderFormat(),
    GlmFormat(),
    DeepSeekV3Format(),
    DeepSeekV31Format(),
    MistralArgsFormat(),
    MistralFormat(),
    HermesFormat(),
    Llama3Format(),
)

THOUGHT_FORMATS: tuple[ThoughtMarkers, ...] = (
    ThoughtMarkers(name="think", start="<think>", end="</think>"),
    HARMONY_THOUGHTS,
    ThoughtMarkers(name="mistral", start="[THINK]", end="[/THINK]"),
    ThoughtMarkers(name="seed", start="<seed:think>", end="</seed:think>"),
)


def call_format(name: str, template: str | None) -> CallFormat | None:
    """The format by name, or with "auto" the one a template asks for; None = the model has none.

    Raises:
        CheckpointInvalid: there is no such format.
    """
    if name == "none" or (name == "auto" and template is None):
        return None
    if name == "auto":
        assert template is not None
        if "tools" not in template:
            return None
        return next((form for form in CALL_FORMATS if form.detect(template)), None)
    found = next((form for form in CALL_FORMATS if form.name == name), None)
    if found is None:
        raise CheckpointInvalid(f"toolFormat: there is no format {name!r}")
    return found


def channel_format(calls: CallFormat | None, thoughts: ThoughtMarkers | None) -> ChannelFormat | None:
    """What reads a model's answers where all of them are in channels, with tools or without; None = they are plain."""
    if isinstance(calls, ChannelFormat):
        return calls
    return HarmonyFormat() if thoughts is HARMONY_THOUGHTS else None


def thought_format(name: str, template: str | None) -> ThoughtMarkers | None:
    """As ``call_format``, for thoughts."""
    if name == "none" or (name == "auto" and template is None):
        return None
    if name == "auto":
        assert template is not None
        return next((form for form in THOUGHT_FORMATS if form.detect(template)), None)
    found = next((form for form in THOUGHT_FORMATS if form.name == name), None)
    if found is None:
        raise CheckpointInvalid(f"reasoningFormat: there is no format {name!r}")
    return found
