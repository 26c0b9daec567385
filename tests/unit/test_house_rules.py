"""The rules of the house that a tool can check."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from antiphon.cli import VERBS

ROOT = Path(__file__).parents[2]
MAX_LINES = 400  # of a source file; generated code aside
MAX_FILES = 12  # of a folder's own: more are a list that nobody reads
GENERATED = ("rpc/v1",)
CATALOGUES = ("models/families",)  # one file per member, all alike


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


def test_every_verb_of_the_command_has_its_application() -> None:
    for name, verb in VERBS.items():
        path = ROOT / "platform/antiphon/cli" / verb.module.replace(".", "/")
        source = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        assert re.search(r"^app = ", source.read_text(), re.MULTILINE), f"antiphon {name}: {verb.module}"


@pytest.mark.parametrize("arguments", [["--help"], ["validate", "--help"], ["status", "--help"], ["chat", "--help"]])
def test_help_needs_neither_torch_nor_ray(arguments: list[str]) -> None:
    code = (
        f"import sys; from antiphon.cli import main; sys.argv = ['antiphon', *{arguments!r}]\n"
        "try: main()\nexcept SystemExit: pass\n"
        "print(sorted({'torch', 'ray', 'transformers'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert "Usage: antiphon" in result.stdout, result.stdout + result.stderr
    assert result.stdout.strip().endswith("[]"), result.stdout + result.stderr


def test_no_source_file_outgrows_its_room() -> None:
    files = [*ROOT.glob("platform/**/*.py"), *ROOT.glob("operators/**/*.py")]
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in files if "_pb2" not in path.name}
    long = {name: lines for name, lines in lengths.items() if lines > MAX_LINES}
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


def our_modules() -> list[Path]:
    found = [*ROOT.glob("platform/**/*.py"), *ROOT.glob("operators/**/*.py")]
    return [path for path in found if not path.parent.as_posix().endswith(GENERATED)]


def test_no_folder_holds_more_files_than_one_looks_over() -> None:
    sources = [*our_modules(), *(path for base in ("platform", "operators") for path in (ROOT / base).rglob("*.[ch]*"))]
    counts = Counter(path.parent for path in {*sources, *ROOT.glob("tests/**/*.py")} if path.name != "__init__.py")
    full = {
        str(folder.relative_to(ROOT)): count
        for folder, count in counts.items()
        if count > MAX_FILES and not folder.as_posix().endswith((*GENERATED, *CATALOGUES))
    }
    assert not full, full


def test_unit_tests_stand_where_their_subject_stands() -> None:
    """A folder of tests/unit is a folder of the platform, or of the operator under ``operator``; bench and rules are tests' own."""
    units = ROOT / "tests/unit"
    folders = {path.parent.relative_to(units).as_posix() for path in units.rglob("test_*.py")} - {".", "bench"}
    lost = [
        name
        for name in sorted(folders)
        if not (ROOT / "platform/antiphon" / name).is_dir()
        and not (ROOT / "operators/antiphon_operator" / name.removeprefix("operator").lstrip("/")).is_dir()
    ]
    assert not lost, lost


def test_every_module_says_at_which_speed_it_runs() -> None:
    """In the first line of its docstring, in brackets: hot, step, request, control or start-up, or that it holds pure values."""
    silent = []
    for path in our_modules():
        first = (ast.get_docstring(ast.parse(path.read_text())) or "").split("\n")[0]
        said = re.findall(r"\(([^()]*)\)", first)
        if not (said and re.search(r"\b(hot|step|request|control|start-up|any|pure|values)\b", said[-1])):
            silent.append(f"{path.relative_to(ROOT)}: {first}")
    assert not silent, "\n".join(silent)


def called_in(tree: ast.AST) -> set[str]:
    """What is called below a node, by the last part of the name."""
    calls = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return {call.attr if isinstance(call, ast.Attribute) else getattr(call, "id", "") for call in calls}


def test_every_test_checks_something() -> None:
    """An assertion, an expected error, or a function of the file that has one; else a comment that says what raises."""
    idle = []
    for path in ROOT.glob("tests/**/test_*.py"):
        text = path.read_text()
        functions = {n.name: n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)}

        def checks(function: ast.AST, functions: dict[str, ast.AST], above: tuple[str, ...] = ()) -> bool:
            called = called_in(function)
            return (
                any(isinstance(node, ast.Assert) for node in ast.walk(function))
                or any(name in ("raises", "warns", "fail") or name.startswith("assert") for name in called)
                or any(
                    name in functions and name not in above and checks(functions[name], functions, (*above, name))
                    for name in called
                )
            )

        for name, function in functions.items():
            source = "\n".join(text.splitlines()[function.lineno - 1 : function.end_lineno])
            if name.startswith("test_") and not checks(function, functions, (name,)) and not re.search(r"#.*\braises?\b", source):
                idle.append(f"{path.relative_to(ROOT)}:{function.lineno} {name}")
    assert not idle, idle


def test_no_test_sleeps_for_as_long_as_somebody_guessed() -> None:
    """A sleep is a pause between two looks at a condition, in a loop; where real time is meant, a comment on the line says so."""
    guessed = []
    for path in ROOT.glob("tests/**/*.py"):
        lines = path.read_text().splitlines()
        tree = ast.parse("\n".join(lines))
        in_loops = {id(node) for loop in ast.walk(tree) if isinstance(loop, ast.While | ast.For) for node in ast.walk(loop)}
        for node in ast.walk(tree):
            if (
                isinstance(node, ast.Call)
                and ast.unparse(node.func) in ("time.sleep", "asyncio.sleep")
                and id(node) not in in_loops
            ):
                yields = isinstance(node.args[0], ast.Constant) and node.args[0].value == 0
                if not yields and "  # " not in lines[node.lineno - 1]:
                    guessed.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert not guessed, guessed
