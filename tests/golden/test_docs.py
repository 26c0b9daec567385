"""Pages say what is so: files and names that they give exist, walks keep their length, references equal the code."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "deploy/docs"
PLATFORM = ROOT / "platform/antiphon"
PAGES = sorted([*DOCS.glob("*.md"), *ROOT.glob("*.md")], key=lambda path: path.name)
HOP = re.compile(r"^(\d+)\. `([\w/.]+\.py)` `(\w+)`", re.MULTILINE)
MAX_FILES = 12


def walks() -> dict[str, list[tuple[int, str, str]]]:
    sections = re.split(r"^## Walk ", (DOCS / "architecture.md").read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    return {text[0]: [(int(number), path, name) for number, path, name in HOP.findall(text)] for text in sections}


def test_there_are_four_walks_and_the_first_two_are_short() -> None:
    assert sorted(walks()) == ["1", "2", "3", "4"]
    for number in ("1", "2"):
        assert 0 < len({path for _, path, _ in walks()[number]}) <= MAX_FILES
    page = (DOCS / "architecture.md").read_text(encoding="utf-8")
    assert page.count("Twelve files.") == sum(len(walks()[number]) == MAX_FILES for number in ("1", "2")) == 2


@pytest.mark.parametrize("walk", ["1", "2", "3", "4"])
def test_every_hop_is_a_file_with_that_name_in_it(walk: str) -> None:
    hops = walks()[walk]
    assert [number for number, _, _ in hops] == list(range(1, len(hops) + 1))
    for _, path, name in hops:
        assert (PLATFORM / path).is_file(), path
        assert re.search(rf"^(class|def|async def) {name}\b", (PLATFORM / path).read_text(), re.MULTILINE), f"{path}: no {name}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_and_pages_that_are_named_are_there(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    bases = (ROOT, PLATFORM, PLATFORM / "models", PLATFORM / "models/families")
    for name in re.findall(r"`([\w.-]+(?:/[\w.-]+)+\.(?:py|md|yaml|toml|c|cpp|h|proto))`", text):
        assert any((base / name).exists() for base in bases), f"{page.name} names {name}"
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_the_references_are_what_the_code_says() -> None:
    command = [sys.executable, str(DOCS / "reference.py"), "--check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


def test_the_check_of_the_references_finds_a_page_that_is_old(tmp_path: Path) -> None:
    script = tmp_path / "deploy/docs/reference.py"
    script.parent.mkdir(parents=True)
    script.write_text((DOCS / "reference.py").read_text())
    (tmp_path / "protos").symlink_to(ROOT / "protos")
    (script.parent / "api.md").write_text((DOCS / "api.md").read_text())
    (script.parent / "configuration.md").write_text("# Configuration reference\n")
    done = subprocess.run([sys.executable, str(script), "--check"], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    assert "configuration.md differ" in done.stderr
    assert "api.md" not in done.stderr


def test_every_page_is_in_the_index() -> None:
    index = (DOCS / "index.md").read_text(encoding="utf-8")
    missing = [page.name for page in DOCS.glob("*.md") if page.name != "index.md" and f"({page.name})" not in index]
    assert not missing, missing
    assert "(deploy/docs/index.md)" in (ROOT / "README.md").read_text(encoding="utf-8")
