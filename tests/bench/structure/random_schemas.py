"""Ten thousand random schemas on a real model at a high temperature, for a night: JSON lines, the last one the whole.

    python tests/bench/structure/random_schemas.py CHECKPOINT [--count 10000] [--batch 64] [--temperature 1.5] [--seed 0]

Whatever finished must be valid by jsonschema; what was cut must not pass for finished. The first that fails is printed with its
schema and ends the run. The schemas are those of the test that is in every run, drawn from other seeds.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import time
from pathlib import Path
from typing import Any

import jsonschema
from hypothesis import HealthCheck, Phase, given, seed, settings
from tokenizers import Tokenizer

from antiphon.core.request import FinishReason, OutputRules
from antiphon.gateway.text.answer_grammar import answer_grammar
from antiphon.gateway.text.chat_options import AnswerShape, ChatOptions
from antiphon.testing import LocalCluster, wiring
from antiphon.worker.structure.grammar import why_invalid

TEST = Path(__file__).parents[2] / "golden" / "test_random_schemas.py"
PROMPT = "Answer in JSON: "


def drawn(count: int, first_seed: int) -> list[dict[str, Any]]:
    """So many different schemas."""
    spec = importlib.util.spec_from_file_location("random_schemas_test", TEST)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found: dict[str, dict[str, Any]] = {}
    number = first_seed
    while len(found) < count:
        num_examples = min(2000, max(20, 2 * (count - len(found))))

        @seed(number)
        @given(schema=module.schemas)
        @settings(
            max_examples=num_examples,
            deadline=None,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        def collect(schema: dict[str, Any]) -> None:
            found.setdefault(json.dumps(schema, sort_keys=True), schema)

        collect()
        number += 1
    return list(found.values())[:count]


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--max-tokens", type=int, default=160)
    parser.add_argument("--temperature", type=float, default=1.5)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    tokenizer = Tokenizer.from_file(str(arguments.checkpoint / "tokenizer.json"))
    prompt = tokenizer.encode(PROMPT).ids
    schemas = drawn(arguments.count, arguments.seed)
    num_finished = num_cut = num_refused = 0
    start_s = time.monotonic()
    spec = wiring(
        arguments.checkpoint,
        "monolith",
        model={"maxModelLen": 256},
        scheduler={"maxNumSeqs": arguments.batch},
        cache={"numBlocks": 16 * arguments.batch},
    )
    with LocalCluster(spec, arguments.checkpoint) as cluster:
        eos = cluster.facts.config.eos_token_ids
        for start in range(0, len(schemas), arguments.batch):
            asked: dict[Any, dict[str, Any]] = {}
            for number, schema in enumerate(schemas[start : start + arguments.batch], start):
                options = ChatOptions(shape=AnswerShape(kind="json_schema", value=schema))
                grammar, _ = answer_grammar(options, (), None, None, is_open=False, special_tokens={})
                if grammar is None or why_invalid(grammar) is not None:
                    num_refused += 1
                    continue
                name = cluster.submit(
                    prompt,
                    max_tokens=arguments.max_tokens,
                    temperature=arguments.temperature,
                    seed=arguments.seed + number,
                    eos=eos,
                    rules=OutputRules(grammar=grammar),
                )
                asked[name] = schema
            cluster.run()
            for name, schema in asked.items():
                output = cluster.outputs.pop(name)
                text = tokenizer.decode(output.token_ids, skip_special_tokens=True)
                if output.finish_reason is FinishReason.LENGTH:
                    num_cut += 1
                    continue
                num_finished += 1
                try:
                    assert output.finish_reason is FinishReason.STOP, output.error
                    jsonschema.Draft202012Validator(schema).validate(json.loads(text))
                except Exception:
                    print(json.dumps({"schema": schema, "answer": text, "failed": True}), flush=True)
                    raise
            figures = {"schemas": start + arguments.batch, "finished": num_finished, "cut": num_cut, "refused": num_refused}
            print(json.dumps({**figures, "seconds": round(time.monotonic() - start_s, 1)}), flush=True)
    whole = {"finished": num_finished, "valid": num_finished, "cut": num_cut, "refused": num_refused}
    print(json.dumps({"whole": whole, "temperature": arguments.temperature, "seed": arguments.seed}))


if __name__ == "__main__":
    main()
