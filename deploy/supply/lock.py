"""Writes requirements.lock and operator.lock of deploy/images: what they install, by version and by files' hashes (control speed).

    python deploy/supply/lock.py          after a change of constraints.txt or of pyproject.toml's dependencies; needs uv on PATH

Versions are those of constraints.txt. torch and what it brings for cards are left out: they come from an index of their own, which
differs by the kind of image. The operator's lock is a part of the other: what its packages need here, where all are installed.
"""

from __future__ import annotations

import importlib.metadata
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

DEPLOY = Path(__file__).parents[1]
LOCK = DEPLOY / "images" / "requirements.lock"
OPERATOR_LOCK = DEPLOY / "images" / "operator.lock"
EXTRAS = ("route", "convert", "operator")
# What the running operator imports, and nothing of the data plane: no torch, no Ray; downloads run in the worker's image.
OPERATOR = ("aiohttp", "jsonpatch", "kopf", "lightkube", "prometheus-client", "pydantic", "pyyaml", "typer")
_LEFT_OUT = re.compile(r"(torch|triton|nvidia-[a-z0-9-]+|cuda-[a-z0-9-]+)==")
_HEAD = "# Written by deploy/supply/lock.py. Versions as in constraints.txt; torch comes from an index of its own.\n"
_TIMEOUT_S = 600


def entries(text: str) -> list[str]:
    """The lock's requirements, each with its lines of hashes."""
    found: list[str] = []
    for line in text.splitlines(keepends=True):
        if line.startswith("#"):
            continue
        if line[:1].isspace():
            found[-1] += line
        else:
            found.append(line)
    return found


def kept(text: str) -> str:
    """The lock without what is left out."""
    return _HEAD + "".join(entry for entry in entries(text) if not _LEFT_OUT.match(entry))


def needed(names: Iterable[str]) -> set[str]:
    """``names`` and all that they need, as installed here."""
    found: set[str] = set()
    waiting = list(names)
    while waiting:
        name = canonicalize_name(waiting.pop())
        if name in found:
            continue
        found.add(name)
        for text in importlib.metadata.requires(name) or ():
            need = Requirement(text)
            if need.marker is None or need.marker.evaluate({"extra": ""}):
                waiting.append(need.name)
    return found


def operators(lock: str) -> str:
    """The part of the lock that the operator's image installs."""
    names = needed(OPERATOR)
    return _HEAD + "".join(entry for entry in entries(lock) if entry.partition("==")[0] in names)


def main() -> int:
    """Write it; the exit status."""
    uv = shutil.which("uv")
    if uv is None:
        sys.stderr.write("uv is needed, and was not found on PATH\n")
        return 1
    command = [uv, "pip", "compile", str(DEPLOY.parent / "pyproject.toml"), "--constraint", str(DEPLOY / "constraints.txt")]
    command += [part for extra in EXTRAS for part in ("--extra", extra)]
    command += ["--generate-hashes", "--python-version", "3.11.14", "--python-platform", "x86_64-manylinux_2_28"]
    command += ["--no-header", "--no-annotate", "--no-emit-index-url", "--no-emit-find-links"]
    made = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    if made.returncode != 0:
        sys.stderr.write(made.stderr)
        return 1
    LOCK.write_text(kept(made.stdout))
    OPERATOR_LOCK.write_text(operators(LOCK.read_text()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
