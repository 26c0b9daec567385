"""Ten thousand random schemas on a real model at a high temperature, for a night: JSON lines, the last one the whole.

    python tests/bench/structure/random_schemas.py CHECKPOINT [--count 10000] [--batch 64] [--temperature 1.5] [--seed 0]

Whatever finished must be valid by jsonschema; what was cut must not pass for finished. What fails is printed with its schema, and
the run then ends with 1. The schemas are those of the test that is in every run, drawn from other seeds too.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

from tokenizers import Tokenizer

from antiphon.core.request import FinishReason, OutputRules
from antiphon.gateway.text.answer_grammar import answer_grammar
from antiphon.gateway.text.chat_options import AnswerShape, ChatOptions
from antiphon.testing import LocalCluster, wiring
from antiphon.worker.structure.grammar import why_invalid, why_unaffordable

SOURCE = Path(__file__).parents[2] / "golden" / "structure" / "schemas.py"
PROMPT = "Answer in JSON: "


def source() -> ModuleType:
    """The schemas' module."""
    spec = importlib.util.spec_from_file_location("random_schemas_source", SOURCE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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
    random = source()
    schemas = random.drawn(arguments.count, arguments.seed)
    num_finished = num_wrong = num_cut = num_refused = 0
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
                if grammar is None or (why_invalid(grammar) or why_unaffordable(grammar)) is not None:
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
                    random.validate(schema, json.loads(text))
                except Exception as error:  # noqa: BLE001 - whatever is wrong with it is shown
                    num_wrong += 1
                    print(json.dumps({"schema": schema, "answer": text, "wrong": str(error)[:300]}), flush=True)
            figures = {"schemas": start + arguments.batch, "finished": num_finished, "wrong": num_wrong}
            figures |= {"cut": num_cut, "refused": num_refused}
            print(json.dumps({**figures, "seconds": round(time.monotonic() - start_s, 1)}), flush=True)
    whole = {"finished": num_finished, "valid": num_finished - num_wrong, "cut": num_cut, "refused": num_refused}
    print(json.dumps({"whole": whole, "temperature": arguments.temperature, "seed": arguments.seed}))
    sys.exit(num_wrong > 0)


if __name__ == "__main__":
    main()
