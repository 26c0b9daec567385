"""Bytes, rate and time left of downloads and conversions, by the clock and by the disk."""

from __future__ import annotations

import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from antiphon.models.loading import source
from antiphon.models.loading.progress import Amount, Pace, bytes_below, duration, size, watched
from antiphon.models.loading.wheel_file import _told
from antiphon.testing import FakeClock


def test_words_have_bytes_rate_and_time_left_of_the_last_seconds() -> None:
    clock = FakeClock()
    pace = Pace(clock)

    def words(num_bytes: float) -> str:
        return pace.words(Amount(what="Downloading a/b", num_bytes=int(num_bytes), total_bytes=5_400_000_000))

    assert words(0) == "Downloading a/b: 0 B of 5.4 GB"
    clock.advance(2.0)
    assert words(100e6) == "Downloading a/b: 100 MB of 5.4 GB, 50 MB/s, 2 min left"
    for _ in range(6):  # slower by now: the beginning is forgotten
        clock.advance(5.0)
        latest = words(150e6)
    assert latest == "Downloading a/b: 150 MB of 5.4 GB"
    assert pace.words(Amount(what="other", num_bytes=1)) == "other: 1 B"


@pytest.mark.parametrize(
    ("num_bytes", "text"), [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (99_600, "100 kB"), (999_900, "1.0 MB")]
)
def test_sizes_have_two_digits_that_matter(num_bytes: int, text: str) -> None:
    assert size(num_bytes) == text


@pytest.mark.parametrize(("seconds", "text"), [(0.2, "1 s"), (42, "42 s"), (170, "3 min"), (7500, "2 h 5 min")])
def test_durations_are_for_people(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_what_grows_is_looked_at_while_it_grows_and_never_above_its_total(tmp_path: Path) -> None:
    seen: list[Amount] = []
    enough = threading.Event()

    def watch(amount: Amount) -> None:
        seen.append(amount)
        enough.set()

    (tmp_path / "part").write_bytes(b"x" * 5000)
    with watched("w", lambda: bytes_below(tmp_path), lambda: 4000, watch):
        assert enough.wait(10.0)
    assert seen[0] == Amount(what="w", num_bytes=4000, total_bytes=4000)
    number = len(seen)
    assert not threading.Event().wait(0.6)  # its thread is gone: nothing more comes
    assert len(seen) == number


def test_holes_of_a_file_that_is_being_written_do_not_count(tmp_path: Path) -> None:
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(10_000_000)
    assert bytes_below(tmp_path) < 1_000_000
    assert bytes_below(tmp_path / "none") == 0


def test_pip_says_how_large_wheels_are(tmp_path: Path) -> None:
    said = tmp_path / "pip.txt"
    said.write_text("Collecting a\n  Downloading a-1-py3-none-any.whl (1.5 MB)\n  Using cached b-1.whl (20 kB)\n")
    assert _told(said) == 1_520_000
    said.write_text("Collecting a\n")
    assert _told(said) is None


def test_a_snapshot_tells_what_it_still_has_to_fetch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    blobs = tmp_path / "hub" / "models--org--name" / "blobs"
    blobs.mkdir(parents=True)
    (blobs / "kept").write_bytes(b"k" * 700)
    files = [
        SimpleNamespace(rfilename=name, size=size)
        for name, size in (("config.json", 700), ("model.safetensors", 4000), ("a.bin", 9))
    ]
    fetched = threading.Event()
    seen: list[Amount] = []

    class Hub:
        def model_info(self, name: str, **_options: object) -> SimpleNamespace:
            return SimpleNamespace(siblings=files, sha="abc")

    def download(name: str, **options: object) -> str:
        (blobs / "new.incomplete").write_bytes(b"n" * 3000)
        assert fetched.wait(10.0)
        return str(tmp_path)

    def watch(amount: Amount) -> None:
        seen.append(amount)
        fetched.set()

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr(
        huggingface_hub, "try_to_load_from_cache", lambda _name, file, **_options: "/kept" if file == "config.json" else None
    )
    assert source.resolve("hf://org/name", cache_dir=tmp_path, watch=watch) == tmp_path
    assert seen[0] == Amount(what="Downloading org/name", num_bytes=3000, total_bytes=4000)
