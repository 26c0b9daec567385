"""What a client's body and headers say to the router (request speed). Must not know: routers' answers, experts."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

from antiphon.coe.routing.decision import Question
from antiphon.core.document.composition import CompositionSpec, Policy
from antiphon.core.errors import InvalidInput

_CHARS_PER_TOKEN = 4  # of dense text; an underestimate lets an expert itself refuse what is too long
_PARTS = {"image_url": "image", "input_image": "image", "image": "image", "input_audio": "audio", "video_url": "video"}
_TEXTS = ("text", "input_text", "output_text")
_MAX_TOKENS = ("max_completion_tokens", "max_output_tokens", "max_tokens")


def question_of(
    body: Mapping[str, Any], headers: Mapping[str, str], spec: CompositionSpec, policy: Policy | None, *, tenant: str
) -> Question:
    """The question behind a body of any door; whatever else is malformed is the expert's door's to refuse.

    Sessions are each tenant's own: nobody finds out, or decides, where another's goes.

    Raises:
        InvalidInput: the prompt is token ids, which mean another text to every expert.
    """
    texts, modalities = _contents(body)
    max_tokens = next((body[name] for name in _MAX_TOKENS if body.get(name) is not None), None)
    num_output = max_tokens if isinstance(max_tokens, int) and not isinstance(max_tokens, bool) else 0
    allow_header = spec.auth.allow_experts_header
    allowed = None
    if allow_header is not None:
        listed = headers.get(allow_header.lower(), "")
        allowed = frozenset(name.strip() for name in listed.split(",") if name.strip())
    return Question(
        prompt=texts[-1] if texts else "",
        session=_session(headers.get("x-antiphon-session", "")[:256], tenant),
        expert=headers.get("x-antiphon-expert"),
        category=headers.get("x-antiphon-category"),
        language=headers.get("x-antiphon-language"),
        policy=policy,
        headers={name: value for name, value in headers.items() if name not in ("authorization", "cookie", "x-api-key")},
        context_tokens=sum(map(len, texts)) // _CHARS_PER_TOKEN + max(0, num_output),
        modalities=modalities,
        tools=bool(body.get("tools") or body.get("functions")),
        allowed=allowed,
    )


def _session(name: str, tenant: str) -> str:
    if not name or not tenant:
        return name
    return hashlib.blake2b(f"{tenant}\0{name}".encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def _contents(body: Mapping[str, Any]) -> tuple[list[str], tuple[str, ...]]:
    """All texts, the one to judge last: the user's newest message, or the prompt. And the modalities."""
    modalities = {"text": None}
    prompt = body.get("prompt")
    if isinstance(prompt, str):
        return [prompt], ("text",)
    if isinstance(prompt, list):
        if any(not isinstance(text, str) for text in prompt):
            raise InvalidInput("a composition takes text: token ids mean another text to every expert", "prompt")
        return [text for text in prompt if isinstance(text, str)], ("text",)
    texts: list[str] = []
    asked = ""
    told = body.get("instructions", body.get("system"))  # Responses' and Messages' names for what the system says
    said = body.get("input", body.get("messages"))
    items = said if isinstance(said, list) else [{"role": "user", "content": said}] if isinstance(said, str) else []
    for message in [{"role": "system", "content": told}, *items] if told else items:
        if not isinstance(message, dict):
            continue
        content = message.get("content", message.get("output"))
        parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
        found = []
        for part in parts:
            if not isinstance(part, dict):
                continue
            kind = part.get("type")
            if kind in _TEXTS and isinstance(part.get("text"), str):
                found.append(part["text"])
            elif isinstance(kind, str) and kind in _PARTS:
                modalities[_PARTS[kind]] = None
        text = "\n".join(found)
        texts.append(text)
        if message.get("role") == "user":
            asked = text
    if asked and asked in texts:
        texts.remove(asked)
        texts.append(asked)
    return texts, tuple(modalities)
