"""A made-up score table for trying the commands without data: three subjects, one expert good at each (control speed, offline).

Must not know: training.
"""

from __future__ import annotations

import random

import numpy as np

from antiphon.coe.training.data.table import ScoreTable, TableExpert

_FORMS = {
    "code": (
        "write a function that sorts {a} items",
        "fix the bug in this python loop {a}",
        "implement a class with {b} methods",
    ),
    "sums": (
        "add the numbers {a} and {b}",
        "what is {a} plus {b} minus 7",
        "multiply {a} by {b} apples in a basket",
    ),
    "trivia": (
        "who was the king in the year {a}",
        "which river flows through town {b}",
        "name the capital of kingdom {a}",
    ),
}
_GOOD, _ELSE = 0.9, 0.3


def example_table(num_per_dataset: int = 40, num_datasets: int = 3, seed: int = 0, *, categories: bool = True) -> ScoreTable:
    """``num_datasets`` datasets in each of three subjects; expert i is right 9 times of 10 in subject i, else 3 to 4 of 10."""
    source = random.Random(seed)
    rows = []
    for good, (subject, forms) in enumerate(_FORMS.items()):
        for d in range(num_datasets):
            for i in range(num_per_dataset):
                form = source.choice(forms).format(a=source.randint(1, 9999), b=source.randint(1, 9999))
                odds = [_GOOD if m == good else _ELSE + 0.05 * m for m in range(3)]
                rows.append((f"{form} (case {d}-{i})", f"{subject}-{d}", subject, [float(source.random() < p) for p in odds]))
    source.shuffle(rows)
    return ScoreTable(
        experts=tuple(TableExpert(name=f"model-{m}", active_params_b=p) for m, p in enumerate((7.0, 8.0, 70.0))),
        prompts=tuple(row[0] for row in rows),
        datasets=tuple(row[1] for row in rows),
        categories=tuple(row[2] if categories else None for row in rows),
        scores=np.array([row[3] for row in rows]),
        source="made up",
    )
