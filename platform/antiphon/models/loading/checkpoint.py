"""Reads a Hugging Face checkpoint directory tensor by tensor, slice by slice (control speed: while a worker starts).

    <dir>/config.json                      what the model is
    <dir>/generation_config.json           optional: default sampling, stop ids
    <dir>/model.safetensors                all tensors, or
    <dir>/model.safetensors.index.json     tensor -> shard file, beside the shards

Only what is asked for is copied out of the files, so that a worker's resident weights are those of its role and shard.
Must not know: families, roles, or what a tensor is for.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any, Final, Self

import torch
from safetensors import SafetensorError, safe_open

from antiphon.core.errors import CheckpointInvalid
from antiphon.core.text.json_text import read_json_text

CONFIG: Final = "config.json"
GENERATION_CONFIG: Final = "generation_config.json"
WEIGHTS: Final = "model.safetensors"
INDEX: Final = "model.safetensors.index.json"

_MAX_HEADER_BYTES: Final = 100_000_000  # the safetensors format's own limit
_DTYPES: Final[Mapping[str, torch.dtype]] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Entry:
    file: str
    shape: tuple[int, ...]
    dtype: str


class Checkpoint:
    """One checkpoint directory, open for reading; any thread may read a tensor, one at a time does.

    Make it with ``Checkpoint.open``. ``close()`` unmaps the last file read (reading again maps it again); tensors
    already handed out stay valid because they own their memory.
    """

    def __init__(
        self,
        *,
        path: Path,
        config: Mapping[str, Any],
        generation_config: Mapping[str, Any],
        entries: Mapping[str, _Entry],
        digest: str,
    ) -> None:
        self.path: Final = path
        self.config: Final = config
        self.generation_config: Final = generation_config
        self.names: Final = frozenset(entries)
        self.digest: Final = digest
        self._entries: Final = entries
        self._bytes_read = 0
        self._open_file: tuple[str, Any] | None = None
        self._reading: Final = threading.Lock()

    @classmethod
    def open(cls, path: Path) -> Self:
        """Open a directory and check that every file it promises is whole; no tensor is read.

        Raises:
            CheckpointInvalid: a file is missing, cut short or malformed; the message names it.
        """
        path = Path(path)
        if not path.is_dir():
            raise CheckpointInvalid(f"{path}: no such checkpoint directory")
        config = _read_json(path / CONFIG)
        optional = path / GENERATION_CONFIG
        generation_config = _read_json(optional) if optional.exists() else {}
        digest = hashlib.blake2b(_canonical(config), digest_size=8)
        entries: dict[str, _Entry] = {}
        if (path / WEIGHTS).exists():
            entries.update(_read_header(path, WEIGHTS, digest))
        elif (path / INDEX).exists():
            entries.update(_read_shards(path, digest))
        else:
            raise CheckpointInvalid(f"{path}: has neither {WEIGHTS} nor {INDEX}; only safetensors checkpoints are read")
        return cls(
            path=path,
            config=MappingProxyType(config),
            generation_config=MappingProxyType(generation_config),
            entries=entries,
            digest=digest.hexdigest(),
        )

    @property
    def bytes_read(self) -> int:
        """Bytes of tensor data taken from the files so far, in the files' own types."""
        return self._bytes_read

    def shape(self, name: str) -> tuple[int, ...]:
        """The whole tensor's shape.

        Raises:
            CheckpointInvalid: there is no such tensor.
        """
        return self._entry(name).shape

    def dtype(self, name: str) -> torch.dtype:
        """The type the tensor is stored in.

        Raises:
            CheckpointInvalid: there is no such tensor, or its type is one torch has no equal for.
        """
        stored = self._entry(name).dtype
        if stored not in _DTYPES:
            raise CheckpointInvalid(f"{self.path}: tensor {name!r} is stored as {stored}, which is not supported")
        return _DTYPES[stored]

    def expect(self, name: str, shape: tuple[int, ...]) -> None:
        """Check a tensor's whole shape before reading parts of it.

        Raises:
            CheckpointInvalid: there is no such tensor or its shape differs; the message gives both.
        """
        found = self.shape(name)
        if found != shape:
            raise CheckpointInvalid(f"{self.path}: tensor {name!r} has shape {list(found)}, but the config needs {list(shape)}")

    def tensor(
        self,
        name: str,
        *,
        rows: tuple[int, int] | None = None,
        cols: tuple[int, int] | None = None,
        dtype: torch.dtype | None = None,
    ) -> torch.Tensor:
        """Read one tensor, or the part of it that ``rows`` x ``cols`` spans, into memory of its own.

        Args:
            name: The tensor's name in the checkpoint.
            rows: First and one-past-last index of dimension 0; None means all.
            cols: The same for dimension 1.
            dtype: Type of the result; None keeps the stored type.

        Returns:
            A contiguous tensor that shares no memory with the files.

        Raises:
            CheckpointInvalid: there is no such tensor, or the part lies outside its shape.
        """
        entry = self._entry(name)
        stored = self.dtype(name)
        index = [slice(0, size) for size in entry.shape]
        for dimension, span in enumerate((rows, cols)):
            if span is not None:
                index[dimension : dimension + 1] = [self._checked(name, dimension, span)]
        with self._reading:
            try:
                handle = self._file(entry.file)
                view = handle.get_slice(name)[tuple(index)] if index else handle.get_tensor(name)
            except (SafetensorError, OSError, RuntimeError, MemoryError) as error:
                raise CheckpointInvalid(f"{self.path / entry.file}: can't read tensor {name!r}: {error}") from error
            self._bytes_read += view.numel() * stored.itemsize
            # The view may lie in the mapped file: an owned copy lets the file go.
            result = torch.empty(view.shape, dtype=stored if dtype is None else dtype)
            return result.copy_(view)

    def close(self) -> None:
        """Unmap the file that was read last; any thread may, any number of times."""
        with self._reading:
            self._open_file = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _entry(self, name: str) -> _Entry:
        entry = self._entries.get(name)
        if entry is None:
            raise CheckpointInvalid(f"{self.path}: has no tensor {name!r}")
        return entry

    def _checked(self, name: str, dimension: int, span: tuple[int, int]) -> slice:
        shape = self._entry(name).shape
        start, stop = span
        if dimension >= len(shape) or not 0 <= start <= stop <= shape[dimension]:
            kind = "rows" if dimension == 0 else "cols"
            raise CheckpointInvalid(f"{self.path}: {kind} {start}:{stop} lie outside tensor {name!r} of shape {list(shape)}")
        return slice(start, stop)

    def _file(self, file: str) -> Any:
        if self._open_file is None or self._open_file[0] != file:
            self._open_file = None  # unmap one before mapping the next
            self._open_file = (file, safe_open(self.path / file, framework="pt", device="cpu"))
        return self._open_file[1]


def _canonical(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = read_json_text(path.read_bytes())
    except FileNotFoundError:
        raise CheckpointInvalid(f"{path.parent}: has no {path.name}") from None
    except (OSError, ValueError) as error:
        raise CheckpointInvalid(f"{path}: can't be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointInvalid(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def _read_shards(path: Path, digest: hashlib.blake2b) -> dict[str, _Entry]:
    weight_map = _read_json(path / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointInvalid(f"{path / INDEX}: weight_map is missing or empty")
    in_file: dict[str, dict[str, _Entry]] = {}
    entries: dict[str, _Entry] = {}
    for name, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file:
            raise CheckpointInvalid(f"{path / INDEX}: weight_map[{name!r}] is {file!r}, not a file name of this directory")
        if file not in in_file:
            if not (path / file).exists():
                raise CheckpointInvalid(f"{path / INDEX}: names {file}, which is not there (for tensor {name!r})")
            in_file[file] = _read_header(path, file, digest)
        if name not in in_file[file]:
            raise CheckpointInvalid(f"{path / INDEX}: puts tensor {name!r} in {file}, which does not hold it")
        entries[name] = in_file[file][name]
    return entries


def _read_header(path: Path, file: str, digest: hashlib.blake2b) -> dict[str, _Entry]:
    """Shapes and types from a file's header, after the library has found the file whole; feeds the digest."""
    full = path / file
    try:
        size_bytes = full.stat().st_size
        with full.open("rb") as stream:
            header = stream.read(min(int.from_bytes(stream.read(8), "little"), _MAX_HEADER_BYTES))
    except OSError as error:  # the library takes any of them for a file that is not there
        raise CheckpointInvalid(f"{full}: can't be read: {error.strerror or error}") from error
    try:
        with safe_open(full, framework="pt", device="cpu"):
            pass  # checks offsets against the file's length
        parsed: dict[str, Any] = read_json_text(header, unique_keys=True)
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointInvalid(f"{full}: not a whole safetensors file: {error}") from error
    except (RuntimeError, MemoryError) as error:  # torch's word for a file that can't be mapped
        raise CheckpointInvalid(f"{full}: its {size_bytes / 2**30:.1f} GiB can't be mapped into this machine's memory") from error
    digest.update(f"{file}:{size_bytes}:".encode() + header)
    return {
        name: _Entry(file=file, shape=tuple(entry["shape"]), dtype=entry["dtype"])
        for name, entry in parsed.items()
        if name != "__metadata__"
    }
