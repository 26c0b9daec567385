"""Every reader of a file that others wrote: whatever its bytes, it gives a value or an error of the tree, within bounded time.

Briefly in ``make test``; ``make fuzz`` sets ANTIPHON_FUZZ_EXAMPLES and runs them at length.
"""

from __future__ import annotations

import gzip
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from antiphon.coe.training.data.table import read_table
from antiphon.core.document.loading import parse_documents
from antiphon.core.errors import AntiphonError
from antiphon.models.loading.checkpoint import INDEX, Checkpoint
from antiphon.models.loading.gguf_file import GgufFile

from .damage import damaged, fuzz

_CPU_S = 20.0  # far beyond what any of these files costs
EXAMPLES_OF_DOCUMENTS = sorted((Path(__file__).parents[2] / "deploy" / "examples").glob("*.yaml"))


@contextmanager
def folder() -> Iterator[Path]:
    """A directory for one example: hypothesis has no fixtures for each."""
    made = Path(tempfile.mkdtemp(prefix="antiphon-fuzz-"))
    try:
        yield made
    finally:
        shutil.rmtree(made)


def bounded(read: Callable[[], object]) -> None:
    """A value or an error of ours, for little of the processor; anything else raises."""
    before_s, told = time.process_time(), "a value"
    try:
        read()
    except AntiphonError as error:
        told = str(error)
    assert 0 < len(told) < 65_536
    assert time.process_time() - before_s < _CPU_S


def _good_gguf() -> bytes:
    gguf = pytest.importorskip("gguf")
    with folder() as base:
        writer = gguf.GGUFWriter(base / "good.gguf", "llama")
        writer.add_block_count(1)
        writer.add_rope_freq_base(1e4)
        writer.add_token_list(["<s>", "a", "é"])
        writer.add_token_types([3, 1, 1])
        writer.add_token_scores([0.0, -1.0, -2.0])
        writer.add_tensor("token_embd.weight", np.ones((4, 8), dtype=np.float32))
        writer.add_tensor("blk.0.attn_q.weight", np.ones((8, 8), dtype=np.float16))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return (base / "good.gguf").read_bytes()


GGUF = _good_gguf()


def _read_gguf(path: Path) -> None:
    file = GgufFile.open(path)
    file.text("general.architecture", "")
    file.integer("llama.block_count", 0)
    file.number("llama.rope.freq_base", 0.0)
    for read, key in ((file.texts, "tokens"), (file.integers, "token_type"), (file.numbers, "scores")):
        try:
            read(f"tokenizer.ggml.{key}")
        except AntiphonError:
            continue
    for name in file.tensor_names:
        file.shape(name)
        file.stored_type(name)
        try:
            file.tensor(name)
        except AntiphonError:
            continue


def test_the_gguf_file_that_is_damaged_is_a_good_one() -> None:
    with folder() as base:
        (base / "a.gguf").write_bytes(GGUF)
        assert GgufFile.open(base / "a.gguf").tensor("token_embd.weight").sum() == 32


@fuzz
@given(damaged(GGUF))
def test_gguf_files(data: bytes) -> None:
    with folder() as base:
        (base / "a.gguf").write_bytes(data)
        bounded(lambda: _read_gguf(base / "a.gguf"))


def _good_shards() -> dict[str, bytes]:
    with folder() as base:
        save_file({"a": torch.zeros(4, 4)}, base / "model-1.safetensors")
        save_file({"b": torch.ones(3, dtype=torch.bfloat16)}, base / "model-2.safetensors")
        index = {"metadata": {"total_size": 70}, "weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
        (base / INDEX).write_text(json.dumps(index))
        (base / "config.json").write_text("{}")
        return {file.name: file.read_bytes() for file in base.iterdir()}


SHARDS = _good_shards()


@fuzz
@given(st.sampled_from(sorted(SHARDS)).flatmap(lambda name: st.tuples(st.just(name), damaged(SHARDS[name]))))
def test_checkpoints_of_several_files(change: tuple[str, bytes]) -> None:
    def read(base: Path) -> None:
        with Checkpoint.open(base) as checkpoint:
            for name in checkpoint.names:
                checkpoint.tensor(name)

    with folder() as base:
        for name, data in (SHARDS | dict([change])).items():
            (base / name).write_bytes(data)
        bounded(lambda: read(base))


@fuzz
@given(st.sampled_from(EXAMPLES_OF_DOCUMENTS).flatmap(lambda path: damaged(path.read_bytes())))
def test_documents(data: bytes) -> None:
    bounded(lambda: parse_documents(data, "fuzz"))


WORDS = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), st.just("1e999"), st.just("../../x")),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=6), inner, max_size=3)),
    max_leaves=6,
)


@fuzz
@given(st.sampled_from(EXAMPLES_OF_DOCUMENTS), st.integers(0, 1 << 16), WORDS)
def test_documents_with_another_value_somewhere(path: Path, at: int, value: object) -> None:
    """Bytes that are changed are mostly no YAML: here one value of a good document is another."""
    documents = list(yaml.safe_load_all(path.read_text()))
    places: list[tuple[object, object]] = []

    def walk(node: object) -> None:
        for key, inner in node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ():
            places.append((node, key))
            walk(inner)

    walk(documents)
    node, key = places[at % len(places)]
    node[key] = value  # type: ignore[index]
    text = yaml.safe_dump_all(documents, allow_unicode=True)
    bounded(lambda: parse_documents(text, "fuzz"))


TABLE = b"\n".join(
    json.dumps(line).encode()
    for line in (
        {"experts": [{"name": "a", "active_params_b": 1.5}, {"name": "b", "role": "general"}], "source": "fuzz"},
        {"prompt": "what is it?", "dataset": "one", "category": "math", "scores": [0.5, 1.0]},
        {"prompt": "and that?", "dataset": "two", "scores": [0.25, None]},
    )
)


def test_the_table_that_is_damaged_is_a_good_one() -> None:
    with folder() as base:
        (base / "table.jsonl").write_bytes(TABLE)
        assert len(read_table(base / "table.jsonl")) == 2


@fuzz
@given(damaged(TABLE), st.sampled_from(["table.jsonl", "table.jsonl.gz"]))
def test_score_tables(data: bytes, name: str) -> None:
    with folder() as base:
        (base / name).write_bytes(gzip.compress(data) if name.endswith(".gz") and len(data) % 2 else data)
        bounded(lambda: read_table(base / name))
