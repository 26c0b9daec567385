"""What the bound against the simple router asks of a table: the simple router against itself, learnt from two draws of it.

    python tests/bench/coe/simple_against_itself.py TABLE.jsonl.gz [TABLE.jsonl.gz ...] [--share 0.95] [--draws 3]

Five folds as in ``antiphon coe evaluate``: in each, the simple router learns from a share of the other folds, drawn by chance,
and again from another draw, so that neither is the better one. A JSON line per table and pair of draws: the share of prompts whose
expert differs, and the paired difference of the scores in points with its 95 % interval. Where that interval begins below the bound
asked of our router, a router as good as the simple one would break it, too.
"""

import argparse
import json
from pathlib import Path

import numpy as np


def main() -> None:
    from antiphon.coe.judging.comparisons import SIMPLE, Rows, expected_scores
    from antiphon.coe.judging.judge import estimate
    from antiphon.coe.training.data.table import read_table
    from antiphon.coe.training.fit import Recipe, folds_of
    from antiphon.coe.training.train import Options, prepare

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tables", nargs="+", type=Path)
    parser.add_argument("--share", type=float, default=0.95, help="of the other folds' rows, drawn twice")
    parser.add_argument("--draws", type=int, default=3, help="pairs")
    args = parser.parse_args()
    for path in args.tables:
        prepared = prepare(read_table(path), Options(recipe=Recipe(num_variants=1)), lambda _: None)
        scores_BM = prepared.table.scores
        rows = Rows(
            prompts=prepared.table.prompts,
            embedding_BD=prepared.fast.embedding_BD,
            num_near=prepared.fast.num_near,
            label_B=prepared.labels.source_B,
            scores_BM=scores_BM,
        )
        fold_B = folds_of(len(scores_BM), 5, 0)

        def picks(seen: np.ndarray, asked: np.ndarray, rows: Rows = rows) -> np.ndarray:
            return expected_scores(SIMPLE, rows, seen, asked).argmax(axis=1)

        for draw in range(args.draws):
            chance, pair_2B = np.random.default_rng(draw), np.zeros((2, len(fold_B)), np.int64)
            for fold in range(5):
                seen = np.flatnonzero(fold_B != fold)
                for picked_B in pair_2B:
                    drawn = np.sort(chance.choice(seen, int(args.share * len(seen)), replace=False))
                    picked_B[fold_B == fold] = picks(drawn, np.flatnonzero(fold_B == fold))
            own = np.arange(len(fold_B))
            over = estimate(100 * (scores_BM[own, pair_2B[1]] - scores_BM[own, pair_2B[0]]), 0)
            line = {
                "bench": "simple-against-itself",
                "table": path.name,
                "num_prompts": len(fold_B),
                "share": args.share,
                "draw": draw,
                "different": round(float((pair_2B[0] != pair_2B[1]).mean()), 4),
                "points": [round(value, 2) for value in (over.mean, over.low, over.high)],
            }
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
