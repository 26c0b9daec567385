"""Prompts with a suffix: each family's markers in its order, what clients write as text, and what ends the answer."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from antiphon.core.errors import InvalidInput
from antiphon.gateway.generation.infilling import FAMILIES, Markers, infilling, infilling_ends
from antiphon.gateway.generation.preparing import Preparer
from antiphon.gateway.generation.request import GenerationRequest, Sampling, TextPrompt
from antiphon.gateway.text.dialect import Dialect, TextFormats
from antiphon.gateway.text.tokenizer import TextModel


def model_with(*markers: str) -> TextModel:
    tokenizer = Tokenizer(
        models.BPE(vocab={char: i for i, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, merges=[])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(marker, special=True) for marker in markers])
    return TextModel(tokenizer, chat_template=None, eos_token_ids=[0])


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.prefix)
def test_a_family_s_markers_stand_around_texts_that_stay_text(family: Markers) -> None:
    model = model_with(family.prefix, family.suffix, family.middle, family.ends[0])
    before, after = f"def f(x):\n    {family.middle}", "  return y ☺ é"
    ids = infilling(model, before, after)
    assert model.decode(ids, skip_special_tokens=False) == f"{family.prefix}{before}{family.suffix}{after}{family.middle}"
    assert [i for i in ids if i in model.special_token_ids] == [
        model.token_id(marker) for marker in (family.prefix, family.suffix, family.middle)
    ]
    assert infilling_ends(model) == {model.token_id(family.ends[0])}


async def test_a_request_with_a_suffix_ends_where_the_family_does_and_a_model_without_markers_refuses() -> None:
    able, unable = model_with("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>", "<|fim_pad|>"), model_with("<|other|>")
    known = {"able": able, "unable": unable}
    with ThreadPoolExecutor(1) as executor:
        dialects = {name: Dialect(model, TextFormats()) for name, model in known.items()}
        preparer = Preparer(known, dialects, executor, cast(Any, None), cast(Any, None))

        def asked(model: str) -> GenerationRequest:
            prompts = (TextPrompt(text="a", suffix="b"),)
            return GenerationRequest(request_id="r", model=model, prompts=prompts, sampling=Sampling(), operation="text_completion")

        (made,) = await preparer.prepare(asked("able"), 100)
        assert made.token_ids == infilling(able, "a", "b")
        assert made.end_ids == {able.token_id("<|fim_pad|>")}
        with pytest.raises(InvalidInput) as refused:
            await preparer.prepare(asked("unable"), 100)
        assert (refused.value.code, refused.value.field) == ("unsupported_parameter", "suffix")
