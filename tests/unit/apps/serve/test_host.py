"""What a serving process leaves on its machine, and how it goes."""

import os
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path

import psutil
import pytest

from antiphon.apps.serve.host import OrphanReaper, check_private, make_run_dir, open_private, ray_dir, remove_tree, sweep_run_dirs
from antiphon.apps.serve.stop_signals import StopRequested, StopSignals
from antiphon.apps.supervision.quiet_streams import QuietStreams
from antiphon.core.errors import Unavailable

LINUX = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="orphans are adopted on Linux only")


def test_a_run_directory_is_private_short_and_says_whose_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", "/var/folders/zz/zyxvpxvq6csfxvn_n0000000000000/T")
    path = make_run_dir()
    try:
        assert path.stat().st_mode & 0o077 == 0
        assert path.name.startswith(f"antiphon-{os.getpid()}-")
        assert len(str(path)) <= 43
    finally:
        remove_tree(path)
    assert not path.exists()


def test_ray_opening_its_directory_to_everybody_leaves_ours_private() -> None:
    path = make_run_dir()
    try:
        ray_dir(path).chmod(0o777)
        check_private(path)
        assert os.path.dirname(ray_dir(path)) == str(path)
    finally:
        remove_tree(path)


def test_a_run_directory_that_others_may_enter_or_that_is_a_link_is_refused(tmp_path: Path) -> None:
    open_to_all = tmp_path / "open"
    open_to_all.mkdir()
    open_to_all.chmod(0o777)
    (tmp_path / "private").mkdir(mode=0o700)
    (tmp_path / "link").symlink_to(tmp_path / "private")
    for path in (open_to_all, tmp_path / "link"):
        with pytest.raises(Unavailable, match="not private"):
            check_private(path)


def test_files_are_never_written_through_a_link_that_somebody_left(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    for name in ("attention-0.json", "attention-0.log"):
        (tmp_path / name).symlink_to(victim)
    with os.fdopen(open_private(tmp_path / "attention-0.json"), "w") as file:
        file.write("configuration")
    with pytest.raises(OSError):
        open_private(tmp_path / "attention-0.log", append=True)
    os.link(victim, tmp_path / "journal.jsonl")
    with pytest.raises(PermissionError):
        open_private(tmp_path / "journal.jsonl", append=True)
    assert victim.read_text() == "precious"
    assert not (tmp_path / "attention-0.json").is_symlink()
    assert (tmp_path / "attention-0.json").read_text() == "configuration"
    assert (tmp_path / "attention-0.json").stat().st_mode & 0o077 == 0


def test_only_directories_of_processes_that_are_gone_are_swept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("antiphon.apps.serve.host.time.sleep", lambda _: pytest.fail("it waits for something that never goes"))
    with subprocess.Popen([sys.executable, "-c", ""]) as gone:
        gone.wait()
    mine, dead, other = (tmp_path / f"antiphon-{n}" for n in (f"{os.getpid()}-ab", f"{gone.pid}-cd", "prefill-ef"))
    for path in (mine, dead, other):
        path.mkdir()
    (kept := tmp_path / "kept").mkdir()
    links = [tmp_path / f"antiphon-{gone.pid}-x{n}" for n in range(50)]
    for link in links:
        link.symlink_to(kept)  # a stranger's: not followed, and not waited for
    assert sweep_run_dirs(tmp_path) == [dead]
    assert mine.exists()
    assert other.exists()
    assert kept.exists()
    assert all(link.is_symlink() for link in links)


@LINUX
def test_descendants_end_even_when_orphaned_stubborn_and_in_sessions_of_their_own() -> None:
    script = textwrap.dedent("""
        import subprocess, sys, time
        from antiphon.apps.serve.host import adopt_orphans, end_descendants
        adopt_orphans()
        stubborn = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(600)"
        parent = f"import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', {stubborn!r}], start_new_session=True,"
        parent += " stdout=subprocess.PIPE); p.stdout.readline(); print(p.pid, flush=True)"
        orphan = int(subprocess.run([sys.executable, "-c", parent], stdout=subprocess.PIPE, check=True).stdout)
        print(orphan, end_descendants(0.2))
    """)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    orphan, number = map(int, done.stdout.split())
    assert number == 1
    assert not psutil.pid_exists(orphan)


def test_who_is_spared_lives_on() -> None:
    script = textwrap.dedent("""
        import psutil, subprocess
        from antiphon.apps.serve.host import end_descendants
        spared, other = subprocess.Popen(["sleep", "600"]), subprocess.Popen(["sleep", "600"])
        print(end_descendants(0.0, spared={spared.pid}), spared.poll(), psutil.pid_exists(other.pid))
        spared.kill()
    """)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split() == ["1", "None", "False"]


def test_streams_are_taken_away_and_given_back() -> None:
    script = textwrap.dedent("""
        import os, sys, tempfile
        from pathlib import Path
        from antiphon.apps.supervision.quiet_streams import QuietStreams
        log = Path(tempfile.mkdtemp()) / "log"
        print("before")
        with QuietStreams(log) as streams:
            os.write(1, b"native noise"); print("python noise", file=sys.stderr)
            print("for people", file=streams.terminal)
        print("after", sorted(log.read_text().replace("noise", "noise ").split()))
    """)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.splitlines() == ["before", "for people", "after ['native', 'noise', 'noise', 'python']"]
    assert done.stderr == ""


@pytest.fixture
def handlers():
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    saved = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, saved, strict=True):
        signal.signal(number, handler)


@pytest.mark.usefixtures("handlers")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_while_starting_interrupts_the_start(number: signal.Signals) -> None:
    signals = StopSignals(lambda: None)
    signals.install()
    with pytest.raises(StopRequested):
        os.kill(os.getpid(), number)
    assert signals.requested


@pytest.mark.usefixtures("handlers")
def test_a_signal_while_serving_ends_the_wait_and_the_next_insists() -> None:
    forced = []
    signals = StopSignals(lambda: forced.append(True))
    signals.install()
    signals.serving()
    assert not signals.wait(0.0)
    os.kill(os.getpid(), signal.SIGINT)
    assert signals.wait(10.0)
    signals.stopping()
    assert not forced
    os.kill(os.getpid(), signal.SIGINT)
    deadline = time.monotonic() + 10
    while not forced and time.monotonic() < deadline:
        time.sleep(0.001)
    assert forced == [True]


def test_quiet_streams_close_twice(tmp_path: Path) -> None:
    streams = QuietStreams(tmp_path / "log")
    streams.close()  # the second raises OSError if it closes the descriptor again
    streams.close()


@LINUX
def test_what_a_killed_command_started_ends_with_it_and_its_directory_goes(tmp_path: Path) -> None:
    script = textwrap.dedent("""
        import subprocess, sys, time
        from pathlib import Path
        from antiphon.apps.serve.host import OrphanReaper, make_run_dir
        run_dir = make_run_dir()
        reaper = OrphanReaper(run_dir)
        stubborn = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
        child = subprocess.Popen([sys.executable, "-c", stubborn], start_new_session=True)
        print(child.pid, run_dir, flush=True)
        time.sleep(600)
    """)
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as command:
        assert command.stdout is not None
        pid, run_dir = command.stdout.readline().split()
        command.kill()
        command.wait(30)
    deadline = time.monotonic() + 30
    while (psutil.pid_exists(int(pid)) and psutil.Process(int(pid)).status() != psutil.STATUS_ZOMBIE) or Path(run_dir).exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_command_that_ends_by_itself_is_not_tidied_up_after(tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    kept.mkdir()
    reaper = OrphanReaper(kept)
    reaper.close()
    reaper.close()
    assert kept.exists()


def test_a_run_gets_a_key_of_its_own_that_goes_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = textwrap.dedent("""
        import os, sys
        from pathlib import Path
        from antiphon.apps.serve.host import give_key, take_key_back
        from antiphon.core.identity import is_given, own_identity
        run_dir = Path(sys.argv[1])
        give_key(run_dir)
        key = run_dir / "key"
        print(key.stat().st_mode & 0o077, os.environ["ANTIPHON_KEY_FILE"] == str(key), own_identity().given)
        take_key_back(run_dir)
        print(is_given())
    """)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("ANTIPHON_KEY")}
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], env=environment, capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.split() == ["0", "True", "True", "False"]
