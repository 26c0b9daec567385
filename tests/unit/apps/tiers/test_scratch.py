"""Where host copies lie, and that those of a process that was killed go."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

from antiphon.apps.tiers.scratch import Scratch, sweep_scratch

HOLDER = """
import sys, time
from pathlib import Path
from antiphon.apps.tiers.scratch import Scratch
made = Scratch(Path(sys.argv[1]))
(made.path / "copy").mkdir()
(made.path / "copy/weights").write_bytes(b"x" * 4096)
print(made.path, flush=True)
time.sleep(600)
"""


def test_what_a_killed_process_left_is_swept_and_what_a_living_one_has_stays(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        path = Path(process.stdout.readline().strip())
        try:
            assert path.stat().st_mode & 0o077 == 0
            assert not sweep_scratch([tmp_path])
            assert (path / "copy/weights").exists()
        finally:
            process.send_signal(signal.SIGKILL)
    mine = Scratch(tmp_path)
    assert sweep_scratch([tmp_path]) == [path]
    assert list(tmp_path.iterdir()) == [mine.path]
    mine.close()
    mine.close()
    assert not list(tmp_path.iterdir())


def test_links_and_files_of_that_name_are_left_alone(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "precious").write_text("x")
    (tmp_path / "antiphon-host-tier-link").symlink_to(victim)
    (tmp_path / "antiphon-host-tier-file").write_text("x")
    assert not sweep_scratch([tmp_path])
    assert (victim / "precious").exists()
    assert (tmp_path / "antiphon-host-tier-file").exists()
