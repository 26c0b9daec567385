"""A call whose argument is being written when an FFN worker is lost, the attention worker is lost, or its request is preempted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer

from antiphon.core.request import FinishReason, OutputRules
from antiphon.gateway.text.answer_grammar import answer_grammar
from antiphon.gateway.text.chat_options import ChatOptions, Tool
from antiphon.gateway.text.events import EventParser, ParserSpec
from antiphon.gateway.text.folded import Folded
from antiphon.gateway.text.formats.registry import call_format
from antiphon.testing import LocalCluster, wiring, write_tiny_llama

LETTERS = 48
TOOL = Tool(
    name="note",
    strict=True,
    parameters={
        "type": "object",
        "properties": {"text": {"type": "string", "pattern": f"^[a-z]{{{LETTERS}}}$"}},
        "required": ["text"],
        "additionalProperties": False,
    },
)
FORM = call_format("hermes", None)
assert FORM is not None
GRAMMAR, _ = answer_grammar(
    ChatOptions(tools=(TOOL,), tool_choice="required", parallel_tool_calls=False),
    (TOOL,),
    FORM,
    None,
    is_open=False,
    special_tokens={},
)
ASKED: dict[str, Any] = {"max_tokens": 200, "temperature": 1.0, "eos": [1], "rules": OutputRules(grammar=GRAMMAR)}
PROMPTS = [[5 + number, 6, 7] * 12 for number in range(4)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def tokenizer(checkpoint: Path) -> Tokenizer:
    return Tokenizer.from_file(str(checkpoint / "tokenizer.json"))


def submit_all(cluster: LocalCluster) -> list[Any]:
    return [cluster.submit(prompt, seed=seed, **ASKED) for seed, prompt in enumerate(PROMPTS)]


def tokens_of(cluster: LocalCluster, names: list[Any]) -> list[list[int]]:
    cluster.run()
    assert all(cluster.outputs[name].finish_reason is FinishReason.STOP for name in names)
    return [cluster.outputs[name].token_ids for name in names]


def text_of(tokenizer: Tokenizer, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=True))


def is_inside(text: str) -> bool:
    """Whether a call's argument has begun and not ended."""
    begun, _, letters = text.partition('"text"')
    return '"arguments"' in begun and 0 < sum(letter.islower() for letter in letters) < LETTERS


@pytest.fixture(scope="module")
def undisturbed(checkpoint: Path, tokenizer: Tokenizer) -> list[list[int]]:
    with LocalCluster(wiring(checkpoint, "monolith", cache={"numBlocks": 128}), checkpoint) as cluster:
        found = tokens_of(cluster, submit_all(cluster))
    for ids in found:
        assert FORM is not None
        parser, result = EventParser(ParserSpec(calls=FORM.machine([TOOL]))), Folded()
        for part in (*parser.feed(text_of(tokenizer, ids)), *parser.finish(truncated=False)):
            result.add(part)
        (call,) = result.calls
        assert (call.name, call.is_whole, len(json.loads(call.arguments)["text"])) == ("note", True, LETTERS)
    assert len({tuple(ids) for ids in found}) == len(found)
    return found


def test_an_ffn_worker_lost_inside_an_argument_changes_no_call(
    checkpoint: Path, tokenizer: Tokenizer, undisturbed: list[list[int]]
) -> None:
    with LocalCluster(wiring(checkpoint, "afd", ffn_replicas=2, cache={"numBlocks": 128}), checkpoint) as cluster:
        names = submit_all(cluster)
        lost = cluster.ffns[0]
        compute, inside = lost.halves.compute, []

        def dies_inside(layer: int, rows: torch.Tensor) -> torch.Tensor:
            written = [text_of(tokenizer, cluster.outputs[name].token_ids) for name in names if name in cluster.outputs]
            if not inside and len(written) == len(names) and all(map(is_inside, written)):
                inside.extend(written)
                for link in list(lost.side._links):
                    link.close()
            return compute(layer, rows)

        lost.halves.compute = dies_inside  # type: ignore[method-assign]
        assert tokens_of(cluster, names) == undisturbed
        assert inside
        assert cluster.generating[0].worker.afd.times.num_resent > 0


def test_a_request_preempted_inside_an_argument_changes_no_call(checkpoint: Path, undisturbed: list[list[int]]) -> None:
    tight = wiring(checkpoint, "monolith", model={"maxModelLen": 256}, cache={"numBlocks": 20, "blockSizeTokens": 16})
    with LocalCluster(tight, checkpoint) as cluster:
        names = submit_all(cluster)
        assert tokens_of(cluster, names) == undisturbed
        assert cluster.generating[0].engine.scheduler.stats.num_preemptions > 0


def test_an_attention_worker_lost_inside_an_argument_changes_no_call(
    checkpoint: Path, tokenizer: Tokenizer, undisturbed: list[list[int]]
) -> None:
    """Another takes up the prompt and the ids so far, as the gateway has them, wherever in the argument that was."""
    whole = undisturbed[0]
    cuts = [cut for cut in range(len(whole)) if is_inside(text_of(tokenizer, whole[:cut]))]
    assert len(cuts) >= LETTERS - 1
    with LocalCluster(wiring(checkpoint, "afd", cache={"numBlocks": 128}), checkpoint) as cluster:
        for cut in cuts[::12]:
            rest = cluster.generate(PROMPTS[0], seed=0, output=whole[:cut], **ASKED)
            assert whole[:cut] + rest == whole
