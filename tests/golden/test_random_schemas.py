"""Answers under random schemas, from a model of random weights at a high temperature: whoever finished is valid, by jsonschema.

Random weights are the harshest writer there is: only the grammar keeps the answer in shape. One engine is made to preempt, so that
outputs are taken up again in the middle.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from antiphon.core.request import FinishReason, OutputRules
from antiphon.gateway.text.answer_grammar import answer_grammar
from antiphon.gateway.text.chat_options import AnswerShape, ChatOptions
from antiphon.testing import LocalCluster, wiring, write_tiny_llama
from antiphon.worker.structure.grammar import why_invalid

_spec = importlib.util.spec_from_file_location("random_schemas", Path(__file__).with_name("structure") / "schemas.py")
assert _spec is not None
assert _spec.loader is not None
source = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(source)

NUM_SCHEMAS = 300
END = 0


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
    asked: dict[Any, dict[str, Any]] = {}
    num_finished = num_preemptions = 0
    with LocalCluster(tight, checkpoint) as cluster:
        for seed, schema in enumerate(source.drawn(NUM_SCHEMAS, 0)):
            shape = AnswerShape(kind="json_schema", value=schema)
            grammar, _ = answer_grammar(ChatOptions(shape=shape), (), None, None, is_open=False, special_tokens={})
            assert grammar is not None
            if why_invalid(grammar) is not None:
                continue  # refused: nothing fits it, or it has a keyword that can't be held
            rules = OutputRules(grammar=grammar)
            name = cluster.submit([5, 6, 7], max_tokens=120, temperature=1.5, seed=seed, eos=[END], rules=rules)
            asked[name] = schema
            if len(asked) % 48 == 0:
                cluster.run()
        cluster.run()
        for name, schema in asked.items():
            output = cluster.outputs[name]
            assert output.finish_reason in (FinishReason.STOP, FinishReason.LENGTH), (schema, output.error)
            num_preemptions += output.last.num_preemptions if output.last is not None else 0
            if output.finish_reason is FinishReason.STOP:
                num_finished += 1
                text = tokenizer.decode(output.token_ids, skip_special_tokens=True)
                source.validate(schema, json.loads(text))
    assert len(asked) > NUM_SCHEMAS // 3
    assert num_finished > len(asked) // 3
    assert num_preemptions > 0


def test_an_answer_taken_up_by_another_worker_is_the_same(checkpoint: Path) -> None:
    schema = {"type": "object", "properties": {"id": {"type": "integer"}, "name": {"type": "string"}}, "required": ["id", "name"]}
    rules = OutputRules(grammar=f"start: %json {json.dumps(schema)}")
    with LocalCluster(wiring(checkpoint, "monolith"), checkpoint) as cluster:
        whole = cluster.generate([5, 6, 7], max_tokens=40, temperature=1.5, seed=11, eos=[END], rules=rules)
        for cut in (1, len(whole) // 2, len(whole) - 1):
            rest = cluster.generate([5, 6, 7], max_tokens=40, temperature=1.5, seed=11, eos=[END], rules=rules, output=whole[:cut])
            assert whole[:cut] + rest == whole
