"""Many prompts of one request: none is worked on once one was too long."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from antiphon.core.errors import ContextLengthExceeded
from antiphon.gateway.generation.preparing import Preparer
from antiphon.gateway.generation.request import GenerationRequest, Sampling, TextPrompt
from antiphon.gateway.text.dialect import Dialect, TextFormats
from antiphon.gateway.text.tokenizer import TextModel

CONTEXT = 100


class Counting(TextModel):
    """Counts the texts it is asked to encode."""

    num_encoded = 0

    def encode(self, text: str, *, add_special_tokens: bool = True, max_tokens: int | None = None) -> tuple[int, ...]:
        self.num_encoded += 1
        return super().encode(text, add_special_tokens=add_special_tokens, max_tokens=max_tokens)


def counting() -> Counting:
    tokenizer = Tokenizer(
        models.BPE(vocab={char: i for i, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, merges=[])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return Counting(tokenizer, chat_template=None, eos_token_ids=[0])


def asked(texts: Sequence[str], max_tokens: int | None = None) -> GenerationRequest:
    prompts = tuple(TextPrompt(text=text, field=f"prompt[{index}]") for index, text in enumerate(texts))
    sampling = Sampling(max_tokens=max_tokens)
    return GenerationRequest(request_id="r", model="m", prompts=prompts, sampling=sampling, operation="text_completion")


async def test_prompts_after_one_that_is_too_long_are_not_tokenized() -> None:
    model = counting()
    with ThreadPoolExecutor(1) as executor:
        preparer = Preparer({"m": model}, {"m": Dialect(model, TextFormats())}, executor, cast(Any, None), cast(Any, None))
        made = await preparer.prepare(asked(["ab", "abc"]), CONTEXT)
        assert [each.max_tokens for each in made] == [CONTEXT - 2, CONTEXT - 3], "the room that each prompt leaves"
        model.num_encoded = 0
        with pytest.raises(ContextLengthExceeded) as refused:
            await preparer.prepare(asked(["ab", "a" * CONTEXT, *["ab"] * 100]), CONTEXT)
    assert (refused.value.field, model.num_encoded) == ("prompt[1]", 2)
