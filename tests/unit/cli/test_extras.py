"""What an extra brings and is not installed is one sentence, never a traceback."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from antiphon.cli import EXTRAS

MODULES = {"scikit-learn": "sklearn", "nixl-cu12": "nixl"}
WITHOUT = """
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {missing!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Missing())
from {cli} import main
main()
"""


def test_every_package_of_an_extra_is_known_by_its_module() -> None:
    project = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = {name: packages for name, packages in project["optional-dependencies"].items() if name != "dev"}
    named = {package.partition(">=")[0]: name for name, packages in reversed(extras.items()) for package in packages}
    modules = {MODULES.get(package, package): name for package, name in named.items()}
    assert modules.keys() == EXTRAS.keys()
    assert all(
        any(module == MODULES.get(p.partition(">=")[0], p.partition(">=")[0]) for p in extras[extra])
        for module, extra in EXTRAS.items()
    )


@pytest.mark.parametrize(
    ("cli", "verb", "said"),
    [
        (
            "antiphon.cli",
            ("coe", "train", "--table", "t.jsonl", "--out", "o"),
            "antiphon coe needs sklearn: pip install 'antiphon[coe]'",
        ),
        ("antiphon.cli", ("coe", "demo"), "antiphon coe needs sklearn: pip install 'antiphon[coe]'"),
        ("antiphon_operator.cli", ("run",), "antiphon-operator needs aiohttp: pip install 'antiphon[operator]'"),
    ],
    ids=["train", "demo", "operator"],
)
def test_a_verb_without_its_extra_says_what_to_install(cli: str, verb: tuple[str, ...], said: str, tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text("{}")
    script = WITHOUT.format(missing=tuple(EXTRAS), cli=cli)
    done = subprocess.run(
        [sys.executable, "-c", script, *verb], capture_output=True, text=True, cwd=tmp_path, timeout=200, check=False
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1] == f"error: {said}"
