"""Answers under random schemas, from a model of random weights at a high temperature: whoever finished is valid, by jsonschema.

Random weights are the harshest writer there is: only the grammar keeps the answer in shape. One engine is made to preempt, so that
outputs are taken up again in the middle.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from antiphon.core.request import FinishReason, OutputRules
from antiphon.gateway.text.answer_grammar import answer_grammar
from antiphon.gateway.text.chat_options import AnswerShape, ChatOptions
from antiphon.testing import LocalCluster, wiring, write_tiny_llama
from antiphon.worker.structure.grammar import why_invalid

NUM_SCHEMAS = 240
END = 0

leaves = st.one_of(
    st.just({"type": "integer"}),
    st.just({"type": "boolean"}),
    st.just({"type": "null"}),
    st.just({"type": "string", "maxLength": 6}),
    st.integers(1, 4).map(lambda n: {"type": "string", "pattern": f"^[a-c]{{{n},{n + 2}}}$"}),
    st.tuples(st.integers(-50, 0), st.integers(1, 50)).map(lambda b: {"type": "integer", "minimum": b[0], "maximum": b[1]}),
    st.lists(st.integers(0, 9) | st.sampled_from(["x", "y z", 'q"']), min_size=1, max_size=4, unique_by=repr).map(
        lambda values: {"enum": values}
    ),
    st.sampled_from(["a", 3, None, False]).map(lambda value: {"const": value}),
)


def _objects(inner: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[dict[str, Any]]:
    def closed(made: tuple[dict[str, Any], int]) -> dict[str, Any]:
        names = sorted(made[0])
        return {
            "type": "object",
            "properties": made[0],
            "required": names[: made[1]],
            "additionalProperties": False,
        }

    names = st.sampled_from(["id", "name", "a b", "ünï", 'quo"te'])
    return st.tuples(st.dictionaries(names, inner, min_size=1, max_size=3), st.integers(0, 3)).map(closed)


schemas = st.recursive(
    leaves,
    lambda inner: st.one_of(
        _objects(inner),
        inner.map(lambda item: {"type": "array", "items": item, "maxItems": 2}),
        st.lists(inner, min_size=1, max_size=2).map(lambda options: {"anyOf": options}),
    ),
    max_leaves=5,
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=380, special_tokens=["<|end|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(['{"name": [true, false, null, 12]}, "a": "b"'] * 5, trainer)
    path = write_tiny_llama(tmp_path_factory.mktemp("tiny"), vocab_size=384)
    tokenizer.save(str(path / "tokenizer.json"))
    return path


def _drawn(num_schemas: int) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []

    @given(schema=schemas)
    @settings(
        max_examples=num_schemas * 2, deadline=None, database=None, derandomize=True, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    def collect(schema: dict[str, Any]) -> None:
        if schema not in found and len(found) < num_schemas:
            found.append(schema)

    collect()
    return found


@pytest.mark.slow
def test_every_finished_answer_is_valid_and_a_cut_one_claims_nothing(checkpoint: Path) -> None:
    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    tight = wiring(
        checkpoint,
        "monolith",
        model={"maxModelLen": 256},
        scheduler={"maxNumSeqs": 64},
        cache={"numBlocks": 64, "blockSizeTokens": 16},
    )
    drawn = _drawn(NUM_SCHEMAS)
    assert len(drawn) > NUM_SCHEMAS * 0.8
    asked: dict[Any, dict[str, Any]] = {}
    num_finished = num_preemptions = 0
    with LocalCluster(tight, checkpoint) as cluster:
        for seed, schema in enumerate(drawn):
            shape = AnswerShape(kind="json_schema", value=schema)
            grammar, _ = answer_grammar(ChatOptions(shape=shape), (), None, None, is_open=False, special_tokens={})
            assert grammar is not None
            assert why_invalid(grammar) is None, schema
            rules = OutputRules(grammar=grammar)
            name = cluster.submit([5, 6, 7], max_tokens=120, temperature=1.5, seed=seed, eos=[END], rules=rules)
            asked[name] = schema
            if seed % 48 == 47:
                cluster.run()
        cluster.run()
        for name, schema in asked.items():
            output = cluster.outputs[name]
            assert output.finish_reason in (FinishReason.STOP, FinishReason.LENGTH), output.error
            num_preemptions += output.last.num_preemptions if output.last is not None else 0
            if output.finish_reason is FinishReason.STOP:
                num_finished += 1
                text = tokenizer.decode(output.token_ids, skip_special_tokens=True)
                jsonschema.Draft202012Validator(schema).validate(json.loads(text))
    assert num_finished > len(drawn) // 2
    assert num_preemptions > 0


def test_an_answer_taken_up_by_another_worker_is_the_same(checkpoint: Path) -> None:
    schema = {"type": "object", "properties": {"id": {"type": "integer"}, "name": {"type": "string"}}, "required": ["id", "name"]}
    rules = OutputRules(grammar=f"start: %json {json.dumps(schema)}")
    with LocalCluster(wiring(checkpoint, "monolith"), checkpoint) as cluster:
        whole = cluster.generate([5, 6, 7], max_tokens=40, temperature=1.5, seed=11, eos=[END], rules=rules)
        for cut in (1, len(whole) // 2, len(whole) - 1):
            rest = cluster.generate([5, 6, 7], max_tokens=40, temperature=1.5, seed=11, eos=[END], rules=rules, output=whole[:cut])
            assert whole[:cut] + rest == whole
