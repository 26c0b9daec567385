"""What is wrong with a checkpoint's files, told from their names, sizes and headers alone (control speed).

Reads a few kilobytes and imports no torch: a checkpoint of any size is looked at before anything slow starts.
Must not know: families, tensors' uses, documents.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

from antiphon.core.text.json_text import read_json_text

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
_NEEDED = (("config.json", "the model's config"), ("tokenizer.json", "its tokenizer"))
_MAX_HEADER_BYTES = 100_000_000  # the format's own limit
_ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2}  # all others one
_FLOATS = ("F64", "F32", "F16", "BF16")


class FilesWrong(Exception):
    """A file lacks, can't be read or is not whole; the message names it."""


def weights_bytes(directory: Path, float_bytes: int) -> int:
    """What the weights take in memory at least, after a look at every file of a checkpoint.

    Args:
        directory: the checkpoint.
        float_bytes: of a floating-point value as it is loaded; what is stored in fewer stays so.

    Raises:
        FilesWrong: a file is missing, can't be read, or is not whole.
    """
    for name, what in _NEEDED:
        if not _exists(directory / name):
            raise FilesWrong(f"{directory} has no {name}, {what}")
        _read_json(directory / name)
    return sum(_bytes_of(path, float_bytes) for path in _weight_files(directory))


def _weight_files(directory: Path) -> list[Path]:
    if _exists(directory / WEIGHTS):
        return [directory / WEIGHTS]
    if not _exists(directory / INDEX):
        raise FilesWrong(f"{directory} has no weights ({WEIGHTS}, or {INDEX} and the files it names)")
    named = _read_json(directory / INDEX).get("weight_map")
    if not isinstance(named, dict) or not named:
        raise FilesWrong(f"{directory / INDEX}: weight_map is missing or empty")
    files = sorted({name for name in named.values() if isinstance(name, str)})
    missing = [name for name in files if not _exists(directory / name)]
    if missing:
        more = f" and {len(missing) - 1} more of {len(files)}" if len(missing) > 1 else ""
        raise FilesWrong(f"{directory / INDEX} names {missing[0]}{more}, which is not there")
    return [directory / name for name in files]


def _bytes_of(path: Path, float_bytes: int) -> int:
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or not 2 <= length <= min(_MAX_HEADER_BYTES, size - 8):
                raise FilesWrong(f"{path} is not a whole safetensors file: it has {size} bytes, its header would have {length}")
            header = read_json_text(file.read(length), unique_keys=True)
        entries = [value for name, value in header.items() if name != "__metadata__"]
        wanted = 8 + length + max((int(entry["data_offsets"][1]) for entry in entries), default=0)
        total = sum(math.prod(map(int, entry["shape"])) * _item_bytes(str(entry["dtype"]), float_bytes) for entry in entries)
    except OSError as error:
        raise FilesWrong(f"{path} can't be read: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, ArithmeticError) as error:
        raise FilesWrong(f"{path} is not a safetensors file: its header can't be read") from error
    if size != wanted:
        raise FilesWrong(f"{path} is not whole: it has {size:,} bytes, its header says {wanted:,}; fetch it again")
    return total


def _item_bytes(stored: str, float_bytes: int) -> int:
    size = _ITEM_BYTES.get(stored, 1)
    return min(size, float_bytes) if stored in _FLOATS else size


def _exists(path: Path) -> bool:
    """Whether there is such a file.

    Raises:
        FilesWrong: nobody here may look.
    """
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise FilesWrong(f"{path} can't be read: {error.strerror or error}") from error
    return True


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = read_json_text(path.read_bytes())
    except OSError as error:
        raise FilesWrong(f"{path} can't be read: {error.strerror or error}") from error
    except ValueError as error:
        raise FilesWrong(f"{path}: can't be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise FilesWrong(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value
