"""Takes out of an image's environment what nothing in it runs, and keeps bytecode of what its starts import (build speed).

    python trim.py remove /opt/antiphon    headers, tests, compilers' parts, symbol tables, all bytecode
    ...                                    checks that run everything an image is for: their imports leave bytecode
    python trim.py keep /opt/antiphon      that bytecode for good: it holds whatever the dates of the files are

A path named here that an environment does not have ends the build, so that the list stays true.
"""

from __future__ import annotations

import py_compile
import shutil
import subprocess
import sys
from pathlib import Path

UNUSED = (
    # Build of extensions, and torch's own tests.
    "torch/include",
    "torch/test",
    "torch/share",
    # torch.compile and its symbolic shapes: the kernels are our own. torch imports these when they are asked for only.
    "torch/_inductor",
    "sympy",
    "isympy.py",
    "mpmath",
    "networkx",
    # Ray for Java, and its libraries for training and data: what runs here is Ray Serve.
    "ray/jars",
    "ray/rllib",
    "ray/tune",
    "ray/train",
    "ray/llm",
    "ray/data",
    "ray/workflow",
    # Installers.
    "pip",
    "setuptools",
    "_distutils_hack",
    "distutils-precedence.pth",
    "virtualenv",
    "distlib",
)
UNUSED_BUT = {"torch/bin": ("torch_shm_manager",)}  # folder -> what stays of it
# Of what is removed, and a profiler.
PROGRAMS = ("pip", "pip3", "isympy", "virtualenv", "py-spy", "torchrun", "torchfrtrace", "tune")
# Large symbol tables. Never in folders *.libs: strip breaks files that were rewritten when their wheel was made.
STRIPPED = ("torch/lib", "ray", "uvloop", "grpc")


def remove(root: Path) -> None:
    """Remove, and strip."""
    (site,) = root.glob("lib/python*/site-packages")
    for name in UNUSED:
        _remove(site / name)  # FileNotFoundError: the list has to follow what is installed
    for folder, kept in UNUSED_BUT.items():
        for path in (site / folder).iterdir():
            if path.name not in kept:
                _remove(path)
    for path in [*site.rglob("tests"), *root.rglob("__pycache__")]:
        if path.is_dir():
            shutil.rmtree(path)
    for name in PROGRAMS:
        _remove(root / "bin" / name)
    for folder in STRIPPED:
        for path in sorted((site / folder).rglob("*")):
            if path.is_file() and not path.is_symlink() and _is_program(path):
                subprocess.run(["strip", "--strip-unneeded", str(path)], check=True)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()


def _is_program(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == b"\x7fELF"


def keep(root: Path) -> None:
    """Compile the modules again that have bytecode, so that it is valid whatever the dates of their files."""
    for path in root.rglob("*.pyc"):
        source = path.parent.parent / f"{path.name.split('.')[0]}.py"
        path.unlink()
        py_compile.compile(str(source), doraise=True, invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH)


if __name__ == "__main__":
    {"remove": remove, "keep": keep}[sys.argv[1]](Path(sys.argv[2]))
