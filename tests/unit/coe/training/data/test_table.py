import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from antiphon.coe.training.data.example_table import example_table
from antiphon.coe.training.data.table import drop_duplicates, filled, read_table, write_table
from antiphon.core.errors import InvalidInput


def _write(path: Path, lines: list[object]) -> Path:
    path.write_text("\n".join(json.dumps(line) for line in lines))
    return path


HEAD = {"experts": [{"name": "a"}, {"name": "b", "active_params_b": 7}], "source": "s"}


def test_a_table_survives_writing_and_reading(tmp_path: Path) -> None:
    table = example_table()
    write_table(table, tmp_path / "t.jsonl.gz")
    again = read_table(tmp_path / "t.jsonl.gz")
    assert again.prompts == table.prompts
    assert again.experts == table.experts
    assert again.digest() == table.digest()


def test_equal_tables_give_equal_bytes(tmp_path: Path) -> None:
    for name in ("a.jsonl.gz", "b.jsonl.gz"):
        write_table(example_table(), tmp_path / name)
    assert (tmp_path / "a.jsonl.gz").read_bytes() == (tmp_path / "b.jsonl.gz").read_bytes()


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ([], "expected a line with experts"),
        ([{"experts": []}], "at least one expert"),
        ([{"experts": [{"name": "a"}, {"name": "a"}]}], "more than once"),
        ([{"experts": [{"name": "a", "active_params_b": -1}]}], "active_params_b of a"),
        ([HEAD, {"prompt": 1, "scores": [0, 1]}], "line 2: expected 'prompt'"),
        ([HEAD, {"prompt": "p", "scores": [0]}], "a list of 2 numbers"),
        ([HEAD, {"prompt": "p", "scores": [0, 1.5]}], "not a number between 0 and 1"),
        ([HEAD, {"prompt": "p", "scores": [0, float("nan")]}], "not a number between 0 and 1"),
        ([HEAD, {"prompt": "p", "scores": [0, True]}], "not a number between 0 and 1"),
        ([HEAD, {"prompt": "p", "category": 3, "scores": [0, 1]}], "'category' must be a string"),
        ([HEAD, [1]], "expected an object"),
        ([{"experts": [{"name": "a", "active_params_b": 10**400}]}], "line 1: active_params_b of a"),
        ([HEAD, {"prompt": "p", "scores": [0, 10**400]}], "line 2: score 1000"),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, lines: list[object], said: str) -> None:
    with pytest.raises(InvalidInput, match=said):
        read_table(_write(tmp_path / "t.jsonl", lines))


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    write_table(example_table(), tmp_path / "t.jsonl.gz")
    (tmp_path / "t.jsonl.gz").write_bytes((tmp_path / "t.jsonl.gz").read_bytes()[:-50])
    with pytest.raises(InvalidInput, match=r"t\.jsonl\.gz can't be read"):
        read_table(tmp_path / "t.jsonl.gz")


def test_costs_are_one_each_unless_every_expert_says_its_own(tmp_path: Path) -> None:
    table = read_table(_write(tmp_path / "t.jsonl", [HEAD, {"prompt": "p", "scores": [0, 1]}]))
    assert not table.has_params
    assert table.params_b.tolist() == [1.0, 1.0]


def test_gzip_and_plain_tables_read_the_same(tmp_path: Path) -> None:
    plain = _write(tmp_path / "t.jsonl", [HEAD, {"prompt": "p", "dataset": "d", "scores": [0, 1]}])
    (tmp_path / "t.jsonl.gz").write_bytes(gzip.compress(plain.read_bytes()))
    assert read_table(plain).digest() == read_table(tmp_path / "t.jsonl.gz").digest()


def test_prompts_that_differ_in_case_or_space_are_one_with_the_mean_score(tmp_path: Path) -> None:
    rows = [
        {"prompt": "Hello  World", "dataset": "x", "scores": [0, 1]},
        {"prompt": "hello world", "dataset": "y", "scores": [1, 1]},
        {"prompt": "other", "dataset": "y", "scores": [0, 0]},
    ]
    table, found = drop_duplicates(read_table(_write(tmp_path / "t.jsonl", [HEAD, *rows])))
    assert table.prompts == ("Hello  World", "other")
    assert np.allclose(table.scores, [[0.5, 1.0], [0.0, 0.0]])
    assert (found.num_exact, found.num_conflicting, found.num_across_datasets) == (1, 1, 1)


@pytest.mark.parametrize("opening", ["[", '{"experts": '])
def test_a_line_that_nests_without_end_is_named(tmp_path: Path, opening: str) -> None:
    (tmp_path / "t.jsonl").write_text(opening * 100_000)
    with pytest.raises(InvalidInput, match=r"t\.jsonl, line 1: nested too deeply"):
        read_table(tmp_path / "t.jsonl")


def test_a_damaged_archive_is_refused(tmp_path: Path) -> None:
    write_table(example_table(), tmp_path / "t.jsonl.gz")
    data = bytearray((tmp_path / "t.jsonl.gz").read_bytes())
    data[200:260] = bytes(60)
    (tmp_path / "t.jsonl.gz").write_bytes(data)
    with pytest.raises(InvalidInput, match=r"t\.jsonl\.gz can't be read"):
        read_table(tmp_path / "t.jsonl.gz")


def test_a_score_that_is_not_known_is_null_and_survives(tmp_path: Path) -> None:
    rows = [{"prompt": "p", "dataset": "d", "scores": [0, None]}, {"prompt": "q", "dataset": "d", "scores": [1, 0.5]}]
    table = read_table(_write(tmp_path / "t.jsonl", [HEAD, *rows]))
    write_table(table, tmp_path / "again.jsonl")
    again = read_table(tmp_path / "again.jsonl")
    assert np.isnan(again.scores[0, 1])
    assert again.complete.tolist() == [1]
    assert filled(again).scores[0, 1] == pytest.approx(0.5)
    with pytest.raises(InvalidInput, match="expert 'b' has no score"):
        filled(again.rows([0]))


def test_duplicates_of_which_one_has_the_score_agree(tmp_path: Path) -> None:
    rows = [{"prompt": "p", "dataset": "d", "scores": [0, None]}, {"prompt": "P", "dataset": "d", "scores": [None, 1]}]
    table, found = drop_duplicates(read_table(_write(tmp_path / "t.jsonl", [HEAD, *rows])))
    assert table.scores.tolist() == [[0.0, 1.0]]
    assert found.num_conflicting == 0


@pytest.mark.parametrize(
    ("head", "row"),
    [
        ({"experts": [{"name": "a\nb"}, {"name": "c"}]}, {}),
        ({"experts": [{"name": "a "}, {"name": "c"}]}, {}),
        ({"experts": [{"name": "\u202ea"}, {"name": "c"}]}, {}),
        (HEAD, {"dataset": "d\r\nx-forged: 1"}),
        (HEAD, {"category": "law\u2028"}),
        (HEAD, {"category": "\ud800"}),
        (HEAD, {"prompt": "p\udc00"}),
    ],
)
def test_names_that_are_no_line_and_prompts_that_are_no_text_are_refused(
    tmp_path: Path, head: dict[str, object], row: dict[str, object]
) -> None:
    rows = [head, {"prompt": "p", "dataset": "d", "scores": [0, 1], **row}]
    with pytest.raises(InvalidInput, match=r"t\.jsonl, line [12]: "):
        read_table(_write(tmp_path / "t.jsonl", rows))
