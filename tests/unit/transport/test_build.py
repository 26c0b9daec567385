import logging
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from antiphon.transport.native import build

COMPILER = shutil.which("cc") or shutil.which("gcc")
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no C compiler")


@needs_compiler
def test_builders_racing_each_other_leave_one_whole_module(tmp_path: Path) -> None:
    code = "import sys; from antiphon.transport.native import build; sys.exit(build.load() is None)"
    builders = [
        subprocess.Popen([sys.executable, "-c", code], env={"ANTIPHON_CACHE": str(tmp_path), "PATH": "/usr/bin:/bin"})
        for _ in range(3)
    ]
    assert [builder.wait(100) for builder in builders] == [0, 0, 0]
    assert [path.suffix for path in (tmp_path / "native").glob("*/*")] == [".so"]


@needs_compiler
def test_a_second_build_takes_what_the_first_one_left(tmp_path: Path) -> None:
    assert COMPILER is not None
    first = build.CHANNEL.build(tmp_path, COMPILER)
    stamp = first.stat().st_mtime_ns
    assert build.CHANNEL.build(tmp_path, "/no/such/compiler") == first
    assert first.stat().st_mtime_ns == stamp


def test_without_a_compiler_there_is_no_module_and_one_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CC", raising=False)
    with caplog.at_level(logging.WARNING):
        assert build.load.__wrapped__() is None
    assert "no C compiler" in caplog.text


@needs_compiler
def test_a_cache_that_can_not_be_written_to_does_not_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("ANTIPHON_CACHE", str(tmp_path / "file"))
    assert build.load.__wrapped__() is not None


def test_a_compiler_that_fails_leaves_nothing_behind_and_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    compiler = tmp_path / "cc"
    compiler.write_text("#!/bin/sh\necho no such option >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CC", str(compiler))
    monkeypatch.setenv("ANTIPHON_CACHE", str(tmp_path / "cache"))
    with caplog.at_level(logging.WARNING):
        assert build.load.__wrapped__() is None
    assert "no such option" in caplog.text
    assert list((tmp_path / "cache" / "native").glob("*/*")) == []
