"""Expert score tables: prompts with the score of every expert on each (control speed, offline).

Format, JSON lines (gzip when the name ends in .gz). First line ``{"experts": [{"name", "active_params_b"?, "role"?}], "source"}``,
then ``{"prompt", "dataset", "category"?, "scores": [one per expert, 0..1; null = not known]}``. Must not know: routers.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import math
import re
import unicodedata
import zlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from antiphon.core.errors import InvalidInput
from antiphon.core.text.json_text import TooDeep, read_json_text

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

_HALVES: Final = re.compile(r"[\ud800-\udfff]")  # of characters, without the other
DEFAULT_DATASET = "all"
_MAX_PARAMS_B = 100_000.0  # as in documents
_FILL_PRIOR_ROWS = 5.0  # rows of an expert's mean that draw what stands for a missing score


@dataclass(frozen=True, slots=True, kw_only=True)
class TableExpert:
    """A column of the table."""

    name: str
    active_params_b: float | None = None  # 1e9 parameters used per token; None = not known
    role: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreTable:
    """Prompts, where they are from, and scores [num_prompts, num_experts] in 0..1; NaN = not known. Rows keep the file's order."""

    experts: tuple[TableExpert, ...]
    prompts: tuple[str, ...]
    datasets: tuple[str, ...]
    categories: tuple[str | None, ...]
    scores: Floats
    source: str = ""

    def __len__(self) -> int:
        return len(self.prompts)

    def rows(self, index: Sequence[int] | Ints) -> ScoreTable:
        """The table of these rows, in this order."""
        return ScoreTable(
            experts=self.experts,
            prompts=tuple(self.prompts[i] for i in index),
            datasets=tuple(self.datasets[i] for i in index),
            categories=tuple(self.categories[i] for i in index),
            scores=self.scores[np.asarray(index, np.int64)],
            source=self.source,
        )

    @property
    def params_b(self) -> Floats:
        """Active parameters per expert, in 1e9 [num_experts]; 1 for every expert when the table does not say them all."""
        known = [expert.active_params_b for expert in self.experts]
        if any(value is None for value in known):
            return np.ones(len(known))
        return np.array([float(value) for value in known if value is not None])

    @property
    def has_params(self) -> bool:
        """True when the table says every expert's active parameters."""
        return all(expert.active_params_b is not None for expert in self.experts)

    @property
    def complete(self) -> Ints:
        """Rows whose every score is known."""
        found: Ints = np.flatnonzero(np.isfinite(self.scores).all(axis=1))
        return found

    def digest(self) -> str:
        """sha256 of experts and rows, independent of how the file was packed."""
        state = hashlib.sha256()
        for expert in self.experts:
            state.update(json.dumps([expert.name, expert.active_params_b, expert.role]).encode())
        for prompt, dataset, category, scores in zip(self.prompts, self.datasets, self.categories, self.scores, strict=True):
            state.update(json.dumps([prompt, dataset, category, scores.tolist()]).encode())
        return state.hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class Duplicates:
    """What the duplicate and leak check found."""

    num_exact: int  # prompts equal after Unicode, case and white space are made equal; dropped
    num_conflicting: int  # of those, how many had other scores; scores are averaged
    num_across_datasets: int  # of those, how many stood in more than one dataset: they would leak when one is left out


def normalised(prompt: str) -> str:
    """The prompt as the duplicate check compares it: Unicode NFKC, case and white space made equal."""
    return " ".join(unicodedata.normalize("NFKC", prompt).casefold().split())


def drop_duplicates(table: ScoreTable) -> tuple[ScoreTable, Duplicates]:
    """One row per normalised prompt: the first one's, with the mean of all their known scores."""
    groups: dict[str, list[int]] = {}
    for index, prompt in enumerate(table.prompts):
        groups.setdefault(normalised(prompt), []).append(index)
    kept = [group[0] for group in groups.values()]
    result = table.rows(kept)
    scores = table.scores[kept]
    repeated = [group for group in groups.values() if len(group) > 1]
    for place, group in enumerate(groups.values()):
        if len(group) > 1:
            known = np.isfinite(table.scores[group])
            total = np.where(known, table.scores[group], 0.0).sum(axis=0)
            scores[place] = np.where(known.any(axis=0), total / np.maximum(known.sum(axis=0), 1), np.nan)
    found = Duplicates(
        num_exact=len(table) - len(kept),
        num_conflicting=sum(_conflict(table.scores[group]) for group in repeated),
        num_across_datasets=sum(len({table.datasets[i] for i in group}) > 1 for group in repeated),
    )
    return (
        ScoreTable(
            experts=result.experts,
            prompts=result.prompts,
            datasets=result.datasets,
            categories=result.categories,
            scores=scores,
            source=result.source,
        ),
        found,
    )


def _conflict(scores_BM: Floats) -> bool:
    known = np.isfinite(scores_BM)
    return bool((np.where(known, scores_BM, -1.0).max(axis=0) > np.where(known, scores_BM, 2.0).min(axis=0)).any())


def filled(table: ScoreTable) -> ScoreTable:
    """The table to learn from: a score that is not known is the expert's mean in the row's category and dataset, drawn to its mean.

    Raises:
        InvalidInput: an expert has no score at all.
    """
    known = np.isfinite(table.scores)
    for m, expert in enumerate(table.experts):
        if not known[:, m].any():
            raise InvalidInput(f"expert {expert.name!r} has no score in this table", "table")
    if known.all():
        return table
    scores = np.where(known, table.scores, 0.0)
    mean_M = scores.sum(axis=0) / known.sum(axis=0)
    groups: dict[tuple[str | None, str], list[int]] = {}
    for i, place in enumerate(zip(table.categories, table.datasets, strict=True)):
        groups.setdefault(place, []).append(i)
    for group in groups.values():
        total_M = scores[group].sum(axis=0) + _FILL_PRIOR_ROWS * mean_M
        scores[group] = np.where(known[group], scores[group], total_M / (known[group].sum(axis=0) + _FILL_PRIOR_ROWS))
    return replace(table, scores=scores)


def read_table(path: Path) -> ScoreTable:
    """Read and check a table.

    Raises:
        InvalidInput: the file is missing, no table, or a line is wrong; the message names file and line.
    """
    try:
        if path.suffix == ".gz":
            with gzip.open(path, "rt", encoding="utf-8") as lines:
                return _parse(lines, path.name)
        with path.open(encoding="utf-8") as lines:
            return _parse(lines, path.name)
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise InvalidInput(f"table {path} can't be read: {error}", "table") from error


def write_table(table: ScoreTable, path: Path) -> None:
    """Write a table; equal tables give equal bytes."""
    experts = []
    for expert in table.experts:
        entry: dict[str, Any] = {"name": expert.name}
        if expert.active_params_b is not None:
            entry["active_params_b"] = expert.active_params_b
        if expert.role is not None:
            entry["role"] = expert.role
        experts.append(entry)
    lines = [json.dumps({"experts": experts, "source": table.source}, ensure_ascii=False)]
    for i in range(len(table)):
        row: dict[str, Any] = {"prompt": table.prompts[i], "dataset": table.datasets[i]}
        if table.categories[i] is not None:
            row["category"] = table.categories[i]
        row["scores"] = [round(float(score), 9) if math.isfinite(score) else None for score in table.scores[i]]
        lines.append(json.dumps(row, ensure_ascii=False))
    data = ("\n".join(lines) + "\n").encode()
    path.write_bytes(gzip.compress(data, mtime=0) if path.suffix == ".gz" else data)


def _parse(lines: Iterable[str], name: str) -> ScoreTable:
    source = ""
    experts: list[TableExpert] = []
    prompts, datasets, categories, scores = [], [], [], []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"table {name}, line {number}"
        try:
            value = read_json_text(line, unique_keys=True)
        except TooDeep as error:
            raise InvalidInput(f"{where}: nested too deeply", "table") from error
        except ValueError as error:
            raise InvalidInput(f"{where}: not JSON: {error}", "table") from error
        if not isinstance(value, dict):
            raise InvalidInput(f"{where}: expected an object", "table")
        if not experts:
            experts, source = _experts(value, where), str(value.get("source", ""))
            continue
        prompt, dataset, category, row = _row(value, len(experts), where)
        prompts.append(prompt)
        datasets.append(dataset)
        categories.append(category)
        scores.append(row)
    if not experts or not prompts:
        raise InvalidInput(f"table {name}: expected a line with experts and at least one prompt", "table")
    return ScoreTable(
        experts=tuple(experts),
        prompts=tuple(prompts),
        datasets=tuple(datasets),
        categories=tuple(categories),
        scores=np.array(scores, np.float64),
        source=source,
    )


def _experts(value: dict[str, Any], where: str) -> list[TableExpert]:
    raw = value.get("experts")
    if not isinstance(raw, list) or not raw:
        raise InvalidInput(f"{where}: expected 'experts', a list with at least one expert", "table")
    experts = []
    for entry in raw:
        if not isinstance(entry, dict) or not isinstance(entry.get("name"), str) or not entry["name"]:
            raise InvalidInput(f"{where}: every expert needs a 'name'", "table")
        _check_name("an expert's name", entry["name"], where)
        params = entry.get("active_params_b")
        if params is not None and not (_is_number(params) and 0 < params <= _MAX_PARAMS_B):
            raise InvalidInput(
                f"{where}: active_params_b of {entry['name']} must be a number above 0, at most {_MAX_PARAMS_B:g}", "table"
            )
        role = entry.get("role")
        experts.append(
            TableExpert(
                name=entry["name"],
                active_params_b=None if params is None else float(params),
                role=None if role is None else str(role),
            )
        )
    repeated = [name for name, count in Counter(expert.name for expert in experts).items() if count > 1]
    if repeated:
        raise InvalidInput(f"{where}: expert {repeated[0]!r} is listed more than once", "table")
    return experts


def _row(value: dict[str, Any], num_experts: int, where: str) -> tuple[str, str, str | None, list[float]]:
    prompt, scores, category = value.get("prompt"), value.get("scores"), value.get("category")
    dataset = value.get("dataset", DEFAULT_DATASET)
    if not isinstance(prompt, str):
        raise InvalidInput(f"{where}: expected 'prompt', a string", "table")
    if not isinstance(dataset, str):
        raise InvalidInput(f"{where}: expected 'dataset', a string", "table")
    if category is not None and not isinstance(category, str):
        raise InvalidInput(f"{where}: 'category' must be a string", "table")
    _check_name("'dataset'", dataset, where)
    _check_name("'category'", category or "", where)
    if _HALVES.search(prompt):
        raise InvalidInput(f"{where}: 'prompt' is not valid Unicode: it holds half of a surrogate pair", "table")
    if not isinstance(scores, list) or len(scores) != num_experts:
        raise InvalidInput(f"{where}: expected 'scores', a list of {num_experts} numbers", "table")
    for score in scores:
        if score is not None and not (_is_number(score) and 0.0 <= score <= 1.0):
            raise InvalidInput(f"{where}: score {str(score)[:40]} is not a number between 0 and 1", "table")
    return prompt, dataset, category or None, [math.nan if score is None else float(score) for score in scores]


def _check_name(what: str, name: str, where: str) -> None:
    if name != name.strip() or not name.isprintable():  # it goes into headers, labels and documents
        raise InvalidInput(f"{where}: {what}, {name[:64]!r}, has control characters, or blanks at its ends", "table")


def _is_number(value: object) -> bool:
    # An int is finite however large it is; math.isfinite would turn it into a float first, and overflow.
    return isinstance(value, int | float) and not isinstance(value, bool) and (isinstance(value, int) or math.isfinite(value))
