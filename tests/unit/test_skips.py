"""A run says what it skipped and why, and fails where nobody has allowed it."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
ALLOWED = "import pytest\n\n\ndef test_a():\n    pytest.skip('etcd is not installed')\n\n\ndef test_b():\n    pass\n"
UNKNOWN = "import pytest\n\npytest.importorskip('no_such_library_anywhere')\n\n\ndef test_c():\n    pass\n"


def run(folder: Path, files: dict[str, str], *options: str) -> subprocess.CompletedProcess[str]:
    """These tests in a process of their own, under the rules of this folder."""
    for name in ("conftest.py", "skips.toml"):
        shutil.copy(TESTS / name, folder)
    for name, text in files.items():
        (folder / name).write_text(text)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        f"--rootdir={folder}",
        "-c",
        "/dev/null",
        *options,
        ".",
    ]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize("options", [(), ("-n", "2")], ids=["alone", "in parallel"])
def test_skips_are_counted_by_reason_and_an_unknown_one_fails_the_run(tmp_path: Path, options: tuple[str, ...]) -> None:
    good = run(tmp_path, {"test_one.py": ALLOWED, "test_two.py": ALLOWED}, *options)
    assert good.returncode == 0, good.stdout
    assert re.search(r"(?m)^ +2  etcd is not installed$", good.stdout), good.stdout
    bad = run(tmp_path, {"test_three.py": UNKNOWN}, *options)
    assert bad.returncode == 1, bad.stdout
    assert re.search(r"(?m)^ +1  NOT ALLOWED: could not import 'no_such_library_anywhere'", bad.stdout), bad.stdout


def test_every_allowed_reason_says_what_it_costs() -> None:
    for entry in tomllib.loads((TESTS / "skips.toml").read_text())["allowed"]:
        re.compile(entry["pattern"])
        assert set(entry) == {"pattern", "why"}
        assert len(entry["why"]) > 20, entry
