"""An echoed prompt's tokens stand where their characters do, however a vocabulary splits them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from antiphon.gateway.generation.request import ChoiceDelta, Logprob, Started, TokenProbability, Usage
from antiphon.gateway.openai.answers import Answer

USAGE = Usage(
    num_prompt_tokens=1,
    num_completion_tokens=0,
    num_cached_tokens=0,
    num_remote_tokens=0,
    num_resumptions=0,
    first_token_s=0.0,
    finished_s=0.0,
)


def offsets_of(text: str, tokens: list[bytes]) -> list[int]:
    """As a client reads them, of an answer that is the echo alone: whole and streamed."""
    chosen = [
        TokenProbability(token_id=i, text=raw.decode(errors="replace"), raw=raw, logprob=-1.0) for i, raw in enumerate(tokens)
    ]
    logprobs = tuple(Logprob(chosen=p, rank=0, top=(), is_first=i == 0) for i, p in enumerate(chosen))
    delta = ChoiceDelta(index=0, text="", prompt_logprobs=logprobs)
    started = Started(request_id="r", model="m", seed=1, num_prompt_tokens=len(tokens), created=0, prompt_texts=(text,))
    streaming = Answer(chat=False, n=1, echo=True, num_logprobs=1)
    streaming.start(started)
    streamed = [chunk["choices"][0]["logprobs"]["text_offset"] for chunk in streaming.chunks(delta)]
    whole = Answer(chat=False, n=1, echo=True, num_logprobs=1)
    whole.start(started)
    whole.add(delta)
    found = whole.body(USAGE)["choices"][0]["logprobs"]["text_offset"]
    assert streamed == [found]
    return list(found)


@pytest.mark.parametrize(
    ("text", "tokens", "expected"),
    [
        ("日本語 x", [b"\xe6\x97", b"\xa5", "本".encode(), b"\xe8", b"\xaa", b"\x9e", b" x"], [0, 0, 1, 2, 2, 2, 3]),
        ("a 🎌b", [b"a", b" \xf0\x9f", b"\x8e", b"\x8c", b"b"], [0, 1, 2, 2, 3]),
        ("The choir", [b"<s>", b" The", b" choir"], [0, 0, 3]),
        ("\ufb01x y", [b"fi", b"x", b" y"], [0, 1, 2]),
        ("\u00e9 end", [b"e", b"\xcc\x81", b" end"], [0, 0, 1]),
        ("", [b"<s>"], [0]),
    ],
    ids=["split", "space and a part", "bos", "made wider", "normalised", "empty"],
)
def test_tokens_stand_where_their_characters_do(text: str, tokens: list[bytes], expected: list[int]) -> None:
    assert offsets_of(text, tokens) == expected


@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=12), data=st.data())
def test_a_prompt_cut_anywhere_has_the_offsets_of_its_bytes(text: str, data: st.DataObject) -> None:
    raw = text.encode()
    cuts = sorted(data.draw(st.sets(st.integers(1, max(1, len(raw) - 1)), max_size=len(raw))) if len(raw) > 1 else [])
    tokens = [raw[a:b] for a, b in zip([0, *cuts], [*cuts, len(raw)], strict=True)]
    chars = [i for i, char in enumerate(text) for _ in char.encode()] or [0]
    assert offsets_of(text, tokens) == [chars[a] for a in [0, *cuts]]
