from dataclasses import replace

import numpy as np
import pytest

from antiphon.coe.judging.comparisons import COMPARISONS, SIMPLE, Rows, expected_scores
from antiphon.coe.training.data.example_table import example_table


def _rows() -> Rows:
    table = example_table()
    place = np.unique([f"{c}/{d}" for c, d in zip(table.categories, table.datasets, strict=True)], return_inverse=True)[1]
    subject = np.unique([str(c) for c in table.categories], return_inverse=True)[1]
    return Rows(
        prompts=table.prompts,
        embedding_BD=np.eye(3, dtype=np.float32)[subject],
        num_near=3,
        label_B=place.astype(np.int64),
        scores_BM=table.scores,
    )


@pytest.mark.parametrize("name", COMPARISONS)
def test_every_comparison_finds_the_expert_of_each_subject(name: str) -> None:
    rows = _rows()
    seen, asked = np.flatnonzero(np.arange(len(rows.prompts)) % 3 != 0), np.flatnonzero(np.arange(len(rows.prompts)) % 3 == 0)
    picked = expected_scores(name, rows, seen, asked).argmax(axis=1)
    gained = rows.scores_BM[asked, picked].mean()
    assert gained > rows.scores_BM[asked].mean(axis=0).max() + 0.2


def test_the_simple_router_of_one_dataset_is_the_best_single_expert() -> None:
    rows = _rows()
    one = Rows(
        prompts=rows.prompts,
        embedding_BD=rows.embedding_BD,
        num_near=3,
        label_B=np.zeros(len(rows.prompts), np.int64),
        scores_BM=rows.scores_BM,
    )
    seen = np.arange(100)
    expected = expected_scores(SIMPLE, one, seen, np.arange(100, 120))
    assert np.allclose(expected, rows.scores_BM[seen].mean(axis=0))


@pytest.mark.parametrize("name", COMPARISONS)
def test_a_table_of_one_expert_has_one_column_everywhere(name: str) -> None:
    rows = replace(_rows(), scores_BM=_rows().scores_BM[:, :1])
    assert expected_scores(name, rows, np.arange(100), np.arange(100, 120)).shape == (20, 1)
