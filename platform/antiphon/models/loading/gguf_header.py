"""Walks a GGUF file's header within the file's own bounds, before a library reads it (control speed: once per file).

The gguf library believes the counts it reads: a damaged one keeps it busy for hours. Here every count is held against the bytes
that are there, so that a walk costs what the header costs. Must not know: what any field means.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import BinaryIO, Final

from antiphon.core.errors import CheckpointInvalid

_MAGIC: Final = b"GGUF"
_VERSIONS: Final = (2, 3)
_STRING, _ARRAY = 8, 9
_SCALAR_BYTES: Final = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_MAX_KEY_BYTES: Final = 65_535
_MAX_DIMENSIONS: Final = 8
_MAX_ARRAY_ITEMS: Final = 16_000_000  # far beyond any vocabulary; the library makes an object of each item
_LEAST_FIELD_BYTES: Final = 8 + 4 + 1
_LEAST_TENSOR_BYTES: Final = 8 + 4 + 4 + 8


def check_header(path: Path) -> None:
    """Refuse a file whose header promises more than the file has.

    Raises:
        CheckpointInvalid: it is not GGUF, or cut short or damaged; the message says at which byte.
    """
    try:
        with path.open("rb") as stream:
            _Walk(path, stream, path.stat().st_size).check()
    except OSError as error:
        raise CheckpointInvalid(f"{path}: can't be read: {error.strerror or error}") from error


class _Walk:
    def __init__(self, path: Path, stream: BinaryIO, size_bytes: int) -> None:
        self._path = path
        self._stream = stream
        self._size_bytes = size_bytes
        self._order = "<"

    def check(self) -> None:
        if self._take(4) != _MAGIC:
            raise self._damaged("it does not begin with GGUF")
        version = self._number("I")
        if version & 0xFFFF == 0:  # written on a machine of the other byte order
            self._order = ">"
            version = int.from_bytes(version.to_bytes(4, "little"), "big")
        if version not in _VERSIONS:
            raise self._damaged(f"version {version} is not known")
        num_tensors, num_fields = self._number("Q"), self._number("Q")
        self._fits(num_fields, _LEAST_FIELD_BYTES, "fields")
        for _ in range(num_fields):
            self._string("the name of a field", _MAX_KEY_BYTES)
            self._value(self._number("I"))
        self._fits(num_tensors, _LEAST_TENSOR_BYTES, "tensors")
        for _ in range(num_tensors):
            self._string("the name of a tensor", _MAX_KEY_BYTES)
            num_dimensions = self._number("I")
            if num_dimensions > _MAX_DIMENSIONS:
                raise self._damaged(f"a tensor has {num_dimensions} dimensions")
            num_elements = 1
            for _ in range(num_dimensions):
                num_elements *= self._number("Q")
            if num_elements == 0 or num_elements > 64 * self._size_bytes:  # no format holds more than some elements in a byte
                raise self._damaged(f"a tensor has {num_elements} elements, the file {self._size_bytes} bytes")
            self._take(4 + 8)

    def _value(self, kind: int) -> None:
        if kind == _STRING:
            self._string("a text", self._size_bytes)
        elif kind == _ARRAY:
            item_kind, num_items = self._number("I"), self._number("Q")
            if num_items > _MAX_ARRAY_ITEMS:
                raise self._damaged(f"an array has {num_items} items")
            if item_kind == _STRING:
                self._fits(num_items, 8, "texts")
                for _ in range(num_items):
                    self._string("a text", self._size_bytes)
            else:
                self._skip(num_items * self._scalar_bytes(item_kind), "an array")
        else:
            self._skip(self._scalar_bytes(kind), "a number")

    def _scalar_bytes(self, kind: int) -> int:
        if kind not in _SCALAR_BYTES:
            raise self._damaged(f"a field is of kind {kind}")
        return _SCALAR_BYTES[kind]

    def _string(self, what: str, max_bytes: int) -> None:
        num_bytes = self._number("Q")
        if num_bytes > max_bytes:
            raise self._damaged(f"{what} has {num_bytes} bytes")
        self._skip(num_bytes, what)

    def _number(self, form: str) -> int:
        form = self._order + form
        (number,) = struct.unpack(form, self._take(struct.calcsize(form)))
        return int(number)

    def _take(self, num_bytes: int) -> bytes:
        taken = self._stream.read(num_bytes)
        if len(taken) != num_bytes:
            raise self._damaged("it ends within its header")
        return taken

    def _skip(self, num_bytes: int, what: str) -> None:
        self._fits(num_bytes, 1, what)
        self._stream.seek(num_bytes, 1)

    def _fits(self, count: int, item_bytes: int, what: str) -> None:
        if count * item_bytes > self._size_bytes - self._stream.tell():
            raise self._damaged(f"{what}: {count} times at least {item_bytes} bytes are promised, which are not there")

    def _damaged(self, why: str) -> CheckpointInvalid:
        return CheckpointInvalid(f"{self._path}: not a whole GGUF file: {why} (byte {self._stream.tell()})")
