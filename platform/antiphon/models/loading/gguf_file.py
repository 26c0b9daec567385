"""The only door to the gguf library: a GGUF file's typed fields and dequantised tensors (control speed).

Must not know: families, Hugging Face names, or where the result goes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, Self

import numpy as np
import numpy.typing as npt

from antiphon.core.errors import CheckpointInvalid, UnsupportedModel
from antiphon.models.loading.gguf_header import check_header

_LIBRARY_MISSING: Final = "reading GGUF files needs the gguf library: pip install gguf"


class GgufFile:
    """One GGUF file, mapped for reading. Make it with ``GgufFile.open``.

    Getters of fields raise ``CheckpointInvalid`` naming the field when it is absent (and no default is given) or of
    another kind. Shapes are in torch's order: rows first.
    """

    def __init__(self, path: Path, reader: Any) -> None:
        self.path: Final = path
        self._reader: Final = reader
        self._tensors: Final[dict[str, Any]] = {tensor.name: tensor for tensor in reader.tensors}
        self.tensor_names: Final = frozenset(self._tensors)

    @classmethod
    def open(cls, path: Path) -> Self:
        """Map a file and read its fields.

        Raises:
            CheckpointInvalid: there is no such file, it is not GGUF or cut short, or the gguf library is not installed.
            UnsupportedModel: it is one part of several.
        """
        try:
            import gguf
        except ImportError:
            raise CheckpointInvalid(_LIBRARY_MISSING) from None
        path = Path(path)
        if not path.is_file():
            raise CheckpointInvalid(f"{path}: no such file")
        check_header(path)
        try:
            file = cls(path, gguf.GGUFReader(path))
        except (ValueError, IndexError, KeyError, TypeError, ArithmeticError, OSError) as error:
            raise CheckpointInvalid(f"{path}: not a whole GGUF file: {error}") from error
        num_parts = file.integer("split.count", 1)
        if num_parts > 1:
            raise UnsupportedModel(f"{path}: is one of {num_parts} parts; merge them into one GGUF file first")
        return file

    def has(self, key: str) -> bool:
        """Whether the field is there."""
        return key in self._reader.fields

    def text(self, key: str, default: str | None = None) -> str:
        """A string field."""
        value = self._value(key, default)
        if not isinstance(value, str):
            raise self._wrong(key, "a string", value)
        return value

    def integer(self, key: str, default: int | None = None) -> int:
        """An integer field."""
        value = self._value(key, default)
        if isinstance(value, bool) or not isinstance(value, int):
            raise self._wrong(key, "an integer", value)
        return value

    def optional_integer(self, key: str) -> int | None:
        """An integer field, or None where it is absent."""
        return self.integer(key) if self.has(key) else None

    def number(self, key: str, default: float | None = None) -> float:
        """A 32-bit float field, as the shortest decimal that stands for it (1e-05, not 9.99999974e-06)."""
        value = self._value(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self._wrong(key, "a number", value)
        return float(str(np.float32(value)))

    def flag(self, key: str, default: bool | None = None) -> bool:
        """A boolean field."""
        value = self._value(key, default)
        if not isinstance(value, bool):
            raise self._wrong(key, "true or false", value)
        return value

    def texts(self, key: str) -> Sequence[str]:
        """An array of strings."""
        value = self._value(key, None)
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self._wrong(key, "an array of strings", value)
        return value

    def integers(self, key: str) -> Sequence[int]:
        """An array of integers."""
        value = self._value(key, None)
        if not isinstance(value, list) or not all(isinstance(item, int) for item in value):
            raise self._wrong(key, "an array of integers", value)
        return value

    def numbers(self, key: str) -> Sequence[float]:
        """An array of floats."""
        value = self._value(key, None)
        if not isinstance(value, list) or not all(isinstance(item, int | float) for item in value):
            raise self._wrong(key, "an array of numbers", value)
        return value

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape, rows first.

        Raises:
            CheckpointInvalid: there is no such tensor.
        """
        return tuple(int(size) for size in reversed(self._tensor(name).shape))

    def tensor(self, name: str) -> npt.NDArray[np.float32]:
        """A tensor's values, dequantised into memory of their own.

        Raises:
            CheckpointInvalid: there is no such tensor.
            UnsupportedModel: it is quantised in a way the gguf library can't undo.
        """
        from gguf.quants import dequantize

        tensor = self._tensor(name)
        try:
            values = dequantize(tensor.data, tensor.tensor_type)
            owned: npt.NDArray[np.float32] = np.array(values, dtype=np.float32, order="C").reshape(self.shape(name))
        except NotImplementedError as error:
            raise UnsupportedModel(
                f"{self.path}: tensor {name!r} is of type {tensor.tensor_type.name}, which can't be dequantised"
            ) from error
        except (ValueError, IndexError) as error:
            raise CheckpointInvalid(f"{self.path}: tensor {name!r} is damaged: {error}") from error
        return owned

    def blocks(self, name: str) -> npt.NDArray[np.uint8]:
        """A quantised tensor's bytes as they are stored, rows first, in memory of their own.

        Raises:
            CheckpointInvalid: there is no such tensor.
        """
        return np.array(self._tensor(name).data, dtype=np.uint8, order="C").reshape(self.shape(name)[0], -1)

    def stored_type(self, name: str) -> str:
        """How a tensor is stored, in GGUF's words: F32, F16, BF16, Q4_1, ...

        Raises:
            CheckpointInvalid: there is no such tensor.
        """
        return str(self._tensor(name).tensor_type.name)

    def _tensor(self, name: str) -> Any:
        tensor = self._tensors.get(name)
        if tensor is None:
            raise CheckpointInvalid(f"{self.path}: has no tensor {name!r}")
        return tensor

    def _value(self, key: str, default: object) -> object:
        field = self._reader.fields.get(key)
        if field is not None:
            try:
                value: object = field.contents()
            except (ValueError, IndexError, TypeError) as error:
                raise CheckpointInvalid(f"{self.path}: field {key!r} can't be read: {error}") from error
            return value
        if default is None:
            raise CheckpointInvalid(f"{self.path}: has no field {key!r}")
        return default

    def _wrong(self, key: str, expected: str, found: object) -> CheckpointInvalid:
        return CheckpointInvalid(f"{self.path}: field {key!r} should be {expected}, found {type(found).__name__}")
