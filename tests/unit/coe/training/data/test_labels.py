"""Categories of rows that nobody labelled: what neighbours agree on, then what their dataset is."""

import numpy as np

from antiphon.coe.training.data.labels import Labels, label
from antiphon.coe.training.data.table import ScoreTable, TableExpert

X, Y, BETWEEN = (1.0, 0.0), (0.0, 1.0), (0.7, 0.7)


def _labels(*rows: tuple[str, str | None, tuple[float, float]]) -> Labels:
    """Of rows (dataset, category, embedding)."""
    table = ScoreTable(
        experts=(TableExpert(name="m", active_params_b=1.0),),
        prompts=tuple(f"prompt {i}" for i in range(len(rows))),
        datasets=tuple(dataset for dataset, _, _ in rows),
        categories=tuple(category for _, category, _ in rows),
        scores=np.zeros((len(rows), 1)),
        source="made up",
    )
    return label(table, np.array([embedding for _, _, embedding in rows], np.float32), 0)


def test_a_row_that_reads_oddly_is_of_its_datasets_category_where_that_has_one() -> None:
    """Left without a class it was one of its own to the simple router and nobody's to ours: other picks for one odd row."""
    mixed = [("mixed", "x", X), ("mixed", "y", Y)] * 10
    found = _labels(*mixed, ("mixed", None, BETWEEN), *[("a", "x", X)] * 20, ("a", None, BETWEEN), *[("b", "y", Y)] * 20)
    assert found.how == "grown"
    assert found.category_B[41] == found.categories.index("x")
    assert found.source_B[41] == found.source_B[40]
    assert found.category_B[20] == -1
    assert found.num_unlabelled == 1


def test_a_table_of_one_dataset_says_nothing_of_rows_that_read_oddly() -> None:
    found = _labels(*[("all", "x", X), ("all", "y", Y)] * 5, *[("all", "x", X)] * 40, ("all", None, BETWEEN))
    assert found.category_B[-1] == -1
