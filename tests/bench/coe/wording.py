"""How often a reworded prompt keeps its expert: wrappers in English and other languages, personas, worked examples, typos and more.

    python tests/bench/coe/wording.py ARTIFACT TABLE.jsonl.gz

A JSON line per rewording: the share of the table's prompts that keep their choice under policy quality, with a 95 % interval, on
rows that the artifact was not trained on (on all of them, and it says so, when it was trained on all). The rewordings are those
that judging uses, none of which stand in training.
"""

import json
import sys
from pathlib import Path

import numpy as np

MAX_PROMPTS = 1500


def main() -> None:
    from antiphon.coe.judging.held_out import unseen_rows
    from antiphon.coe.judging.judge import estimate
    from antiphon.coe.routing.artifact import load_artifact
    from antiphon.coe.routing.decision import Question
    from antiphon.coe.routing.router import Router, spec_of
    from antiphon.coe.training.data.augment import PERTURBATIONS, perturbed
    from antiphon.coe.training.data.table import read_table

    artifact, table = load_artifact(Path(sys.argv[1])), read_table(Path(sys.argv[2]))
    rows = unseen_rows(artifact, table)
    unseen = bool(rows)
    prompts = [table.prompts[i] for i in rows] if unseen else list(table.prompts)
    prompts = prompts[:: max(1, len(prompts) // MAX_PROMPTS)]
    router = Router(spec_of(artifact), artifact)

    def chosen(texts: list[str]) -> list[str]:
        return [router.route(Question(prompt=text)).decision.expert for text in texts]

    plain = chosen(prompts)
    for name in PERTURBATIONS:
        kept = [a == b for a, b in zip(plain, chosen(perturbed(prompts, name, 0)), strict=True)]
        found = estimate(np.array(kept, np.float64), 0)
        line = {"rewording": name, "kept": round(found.mean, 4), "low": round(found.low, 4), "high": round(found.high, 4)}
        print(json.dumps(line | {"n": len(kept), "unseen": unseen}), flush=True)


if __name__ == "__main__":
    main()
