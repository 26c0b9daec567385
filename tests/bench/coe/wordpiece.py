"""WordPiece of a routing decision beside the tokenizers library's, on the same prompts in one run. Run alone, on one core:

taskset -c 0 python tests/bench/coe/wordpiece.py VOCAB.txt TEXTS.txt     one prompt a line; prints a JSON line
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

from tokenizers import BertWordPieceTokenizer

from antiphon.coe.routing.wordpiece import WordPiece

ROUNDS = 5


def median_us(encode: Callable[[str], object], texts: list[str]) -> float:
    times = []
    for text in texts:
        start_s = time.perf_counter()
        encode(text)
        times.append(time.perf_counter() - start_s)
    return statistics.median(times) * 1e6


def main(vocabulary: str, file: str) -> None:
    texts = [line for line in Path(file).read_text(encoding="utf-8").splitlines() if line]
    ours, theirs = WordPiece.from_file(Path(vocabulary)), BertWordPieceTokenizer(vocabulary, lowercase=True)

    def their_ids(text: str) -> list[int]:
        return list(theirs.encode(text, add_special_tokens=False).ids)

    equal = sum(ours.encode(text, 10**6) == their_ids(text) for text in texts)
    rounds = [(median_us(lambda text: ours.encode(text, 512), texts), median_us(their_ids, texts)) for _ in range(ROUNDS)]
    mine_us, theirs_us = (statistics.median(column) for column in zip(*rounds, strict=True))
    print(
        json.dumps(
            {
                "bench": "wordpiece",
                "num_texts": len(texts),
                "num_equal": equal,
                "ours_us": round(mine_us, 1),
                "tokenizers_us": round(theirs_us, 1),
                "ratio": round(theirs_us / mine_us, 2),
            }
        )
    )


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
