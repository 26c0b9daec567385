"""The rules of the house that a tool can check."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_imports_point_one_way() -> None:
    lint = shutil.which("lint-imports", path=str(Path(sys.executable).parent))
    assert lint is not None
    result = subprocess.run([lint], cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert result.returncode == 0, result.stdout[-4000:]


def test_the_source_root_does_not_shadow_the_standard_library() -> None:
    assert not (ROOT / "platform" / "__init__.py").exists()
    code = "import platform; print(platform.python_implementation())"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.stdout.strip() == "CPython", result.stderr


@pytest.mark.parametrize("arguments", [["--help"], ["validate", "--help"], ["status", "--help"], ["chat", "--help"]])
def test_help_needs_neither_torch_nor_ray(arguments: list[str]) -> None:
    code = (
        f"import sys; from antiphon.cli import main; sys.argv = ['antiphon', *{arguments!r}]\n"
        "try: main()\nexcept SystemExit: pass\n"
        "print(sorted({'torch', 'ray', 'transformers'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.stdout.strip().endswith("[]"), result.stdout + result.stderr


def test_no_source_file_outgrows_its_room() -> None:
    files = [*ROOT.glob("platform/**/*.py"), *ROOT.glob("operators/**/*.py")]
    long = {
        str(path.relative_to(ROOT)): lines
        for path in files
        if "_pb2" not in path.name and (lines := len(path.read_text().splitlines())) > 480
    }
    assert not long, long


def test_a_worker_on_the_cpu_loads_no_kernel_compiler_for_cards() -> None:
    code = "import sys, antiphon.apps.process.worker_process, antiphon.testing; print('triton' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.stdout.strip() == "False", result.stdout + result.stderr


def test_no_pattern_takes_a_line_end_for_the_end_of_a_string() -> None:
    """In Python's patterns ``$`` also stands before a last line end: ``fullmatch`` or ``\\Z`` say what is meant."""
    found = []
    for path in [*ROOT.glob("platform/**/*.py"), *ROOT.glob("operators/**/*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.args):
                continue
            pattern = node.args[0]
            is_re = isinstance(node.func.value, ast.Name) and node.func.value.id == "re"
            if is_re and isinstance(pattern, ast.Constant) and str(pattern.value).endswith("$"):
                found.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert not found, found
