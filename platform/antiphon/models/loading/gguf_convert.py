"""Turns a GGUF file into a Hugging Face checkpoint directory (control speed: once per model).

The directory appears whole or not at all. Must not know: where GGUF files come from, or which worker reads the result.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from antiphon.core.errors import CheckpointInvalid, InvalidInput
from antiphon.models.loading.block_scales import CONFIG_FIELD
from antiphon.models.loading.checkpoint import CONFIG, GENERATION_CONFIG, INDEX, WEIGHTS
from antiphon.models.loading.gguf_families import PlannedTensor, family_of, hf_config, plan_tensors
from antiphon.models.loading.gguf_file import GgufFile
from antiphon.models.loading.progress import Watch, watched
from antiphon.models.loading.stored.lines import TYPES, line_names, lines_of
from antiphon.models.loading.tokenizer_files import write_tokenizer

MAX_SHARD_BYTES: Final = 4 * 2**30  # also bounds the memory a conversion needs
OutputType = Literal["exact", "float32", "bfloat16", "four-bit"]
_TORCH_DTYPES: Final[Mapping[str, torch.dtype]] = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# The smallest type that holds every value of a stored one; dequantised values need all of float32.
_EXACT: Final[Mapping[str, torch.dtype]] = {"F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(slots=True)
class _Done:
    num_bytes: int = 0  # converted so far


def convert_gguf(
    gguf: Path,
    out: Path,
    *,
    dtype: OutputType = "exact",
    max_shard_bytes: int = MAX_SHARD_BYTES,
    watch: Watch | None = None,
) -> None:
    """Write ``out`` as a checkpoint directory with the weights, config and tokenizer of a GGUF file.

    Args:
        gguf: The file; quantised weights are dequantised.
        out: Directory to make; it must not exist, or be empty. Its parents are made.
        dtype: Type of the written weights; exact = for each tensor the smallest that loses nothing: loading rounds; four-bit = the
            same, but matrices of layers that are Q4_0 or Q4_1 in the file stay in four bits, in memory too.
        max_shard_bytes: Larger models are written as several files of about this size.
        watch: Gets how far it is; None = nobody looks.

    Raises:
        CheckpointInvalid: the file is not whole, or lacks a field or tensor; or ``out`` can't be written.
        UnsupportedModel: its family, tokenizer or quantisation is not supported; named in the message.
        InvalidInput: ``out`` holds something already.
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InvalidInput(f"{out} exists already and is not an empty directory", field="out")
    file = GgufFile.open(gguf)
    family = family_of(file)
    try:
        config = hf_config(file, family, _compute_dtype(file) if dtype in ("exact", "four-bit") else dtype)
        planned = plan_tensors(file, family, config)
    except (ArithmeticError, ValueError) as error:
        raise CheckpointInvalid(f"{gguf}: its fields contradict each other: {error}") from error
    out.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        kept = frozenset(tensor.name for tensor in planned if dtype == "four-bit" and _is_kept(file, tensor))
        if kept:
            config = {**config, CONFIG_FIELD: {"quant_method": "gguf", "format": "lines"}}
        _write_json(unfinished / CONFIG, config)
        _write_json(unfinished / GENERATION_CONFIG, _generation_config(file, config))
        write_tokenizer(file, unfinished)
        dtypes = {tensor.name: _TORCH_DTYPES.get(dtype, _exact(file, tensor)) for tensor in planned}
        done, total_bytes = _Done(), sum(_num_bytes(tensor, dtypes) for tensor in planned)
        with watched(f"Converting {gguf.name}", lambda: done.num_bytes, lambda: total_bytes, watch):
            _write_weights(file, planned, unfinished, dtypes, max_shard_bytes, done, kept)
        _make_readable(unfinished)
        os.replace(unfinished, out)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


def _exact(file: GgufFile, planned: PlannedTensor) -> torch.dtype:
    return torch.float32 if planned.shift else _EXACT.get(file.stored_type(planned.source), torch.float32)


def _compute_dtype(file: GgufFile) -> str:
    """What "auto" computes in: float32 where the file is, else what the quantised weights are precise enough for."""
    return "float32" if {file.stored_type(name) for name in file.tensor_names} == {"F32"} else "bfloat16"


def _generation_config(file: GgufFile, config: Mapping[str, Any]) -> dict[str, Any]:
    stops = [config["eos_token_id"], file.optional_integer("tokenizer.ggml.eot_token_id")]
    unique = list(dict.fromkeys(stop for stop in stops if stop is not None))
    ids = {key: config[key] for key in ("bos_token_id", "pad_token_id") if config[key] is not None}
    if unique:
        ids["eos_token_id"] = unique[0] if len(unique) == 1 else unique
    return ids


def _write_weights(
    file: GgufFile,
    planned: Sequence[PlannedTensor],
    out: Path,
    dtypes: Mapping[str, torch.dtype],
    max_shard_bytes: int,
    done: _Done,
    kept: frozenset[str],
) -> None:
    shards = _shards(planned, dtypes, max_shard_bytes)
    weight_map: dict[str, str] = {}
    num_bytes = 0
    for number, shard in enumerate(shards, start=1):
        name = WEIGHTS if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors: dict[str, torch.Tensor] = {}
        for tensor in shard:
            if tensor.name in kept:
                tensors |= _lines(file, tensor)
            else:
                tensors[tensor.name] = _values(file, tensor).to(dtypes[tensor.name])
            done.num_bytes += _num_bytes(tensor, dtypes)  # of the values: four bits are less to write
        try:
            save_file(tensors, out / name, metadata={"format": "pt"})
        except SafetensorError as error:  # what the library makes of a full disk
            raise CheckpointInvalid(f"{out / name} can't be written: {error}") from error
        weight_map |= dict.fromkeys(tensors, name)
        num_bytes += sum(tensor.nbytes for tensor in tensors.values())
    if len(shards) > 1:
        _write_json(out / INDEX, {"metadata": {"total_size": num_bytes}, "weight_map": weight_map})


def _shards(planned: Sequence[PlannedTensor], dtypes: Mapping[str, torch.dtype], max_bytes: int) -> list[list[PlannedTensor]]:
    shards: list[list[PlannedTensor]] = [[]]
    filled_bytes = 0
    for tensor in planned:
        size_bytes = _num_bytes(tensor, dtypes)
        if shards[-1] and filled_bytes + size_bytes > max_bytes:
            shards.append([])
            filled_bytes = 0
        shards[-1].append(tensor)
        filled_bytes += size_bytes
    return shards


def _num_bytes(planned: PlannedTensor, dtypes: Mapping[str, torch.dtype]) -> int:
    return torch.Size(planned.shape).numel() * dtypes[planned.name].itemsize


def _values(file: GgufFile, planned: PlannedTensor) -> torch.Tensor:
    values = torch.from_numpy(file.tensor(planned.source))
    if planned.shift:
        values += planned.shift
    return _reordered(file, planned, values)


def _is_kept(file: GgufFile, planned: PlannedTensor) -> bool:
    in_layer = planned.name.startswith("model.layers.") and len(planned.shape) == 2
    return in_layer and not planned.shift and file.stored_type(planned.source) in TYPES


def _lines(file: GgufFile, planned: PlannedTensor) -> dict[str, torch.Tensor]:
    parts = lines_of(torch.from_numpy(file.blocks(planned.source)), file.stored_type(planned.source))
    return {name: _reordered(file, planned, part).contiguous() for name, part in zip(line_names(planned.name), parts, strict=True)}


def _reordered(file: GgufFile, planned: PlannedTensor, values: torch.Tensor) -> torch.Tensor:
    if planned.num_reordered_heads == 0:
        return values
    # Within a head, GGUF pairs row 2i with 2i+1 for rotation, Hugging Face row i with i + head_dim/2.
    heads = planned.num_reordered_heads
    if values.shape[0] % (2 * heads):
        raise CheckpointInvalid(f"{file.path}: tensor {planned.source!r} has {values.shape[0]} rows, which are no {heads} heads")
    pairs = values.reshape(heads, values.shape[0] // heads // 2, 2, *values.shape[1:])
    return pairs.transpose(1, 2).reshape(values.shape).contiguous()


def _make_readable(directory: Path) -> None:
    """Give others the read access that a private temporary directory withholds."""
    directory.chmod(0o755)
    for file in directory.iterdir():
        file.chmod(0o644)


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
