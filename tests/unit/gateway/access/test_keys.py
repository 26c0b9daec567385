"""API keys: lines, a file that changes, scopes, expiry."""

from __future__ import annotations

import hashlib
import os
import re
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from antiphon.cli.keys import app
from antiphon.core.budget import TenantLimits
from antiphon.core.errors import InvalidInput, PermissionDenied, Unauthenticated, Unavailable
from antiphon.core.identity import Identity
from antiphon.gateway.access.key_file import KeyFile
from antiphon.gateway.access.key_lines import digest_of, key_line, new_key, parse_lines
from antiphon.gateway.access.keys import OWN_TENANT, ApiKeys, own_key

ALICE, BOB, OPS = new_key(), new_key(), new_key()


class Clock:
    now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


def bearer(key: str) -> str:
    return f"Bearer {key}"


def test_a_line_is_what_sha256sum_gives_and_reads_back_as_itself() -> None:
    line = key_line("team-a", "user", ALICE, "2027-01-31")
    assert hashlib.sha256(ALICE.encode()).hexdigest() in str(line)
    assert ALICE not in str(line)
    assert parse_lines(f"# keys\n\n{line}  # hers\n") == (line,)
    assert line.expires_s == 1801353600  # date -u -d 2027-01-31 +%s


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("", "no key"),
        ("# only words\n", "no key"),
        ("team user", "line 1"),
        ("a user sha256:00\n", "line 1: expected sha256:"),
        (f"ok user sha256:{'0' * 64}\n\nb root sha256:{'1' * 64}", "line 3: the scope is 'root'"),
        (f"te/am user sha256:{'0' * 64}", "no tenant's name"),
        (f"{'x' * 64} user sha256:{'0' * 64}", "no tenant's name"),
        (f"a user sha256:{'0' * 64} expires=soon", "line 1: expires='soon' is no date"),
        (f"a user sha256:{'0' * 64} expires=2027-01-01 expires=2028-01-01", "line 1: 'expires=2028-01-01' is not expected"),
        (f"a user sha256:{'0' * 64} quota=9", "line 1: 'quota=9' is not expected"),
        (f"a user sha256:{'0' * 64}\nb admin sha256:{'0' * 64}", "line 2: the same key"),
    ],
)
def test_a_wrong_line_is_named(text: str, named: str) -> None:
    with pytest.raises(InvalidInput, match=re.escape(named)):
        parse_lines(text)


@pytest.mark.parametrize("key", ["short", "with a blank in its midst", "ünïcödé-is-not-for-headers"])
def test_keys_that_could_be_guessed_or_not_be_sent_get_no_line(key: str) -> None:
    with pytest.raises(InvalidInput, match="at least 20 printable"):
        key_line("a", "user", key)


def test_keys_have_scopes_and_end(tmp_path: Path) -> None:
    path, clock = tmp_path / "keys", Clock()
    clock.now_s = 1_801_353_599.0
    lines = [key_line("a", "user", ALICE, "2027-01-31"), key_line("ops", "admin", OPS)]
    path.write_text("\n".join(map(str, lines)))
    keys = ApiKeys(["of-the-environment"], KeyFile(path), wall=clock)
    assert keys.check(bearer(ALICE)) == "a"
    assert keys.check(bearer(OPS), admin=True) == "ops"
    tenant = keys.check(bearer("of-the-environment"), admin=True)  # as always: these may do everything
    assert re.fullmatch("[0-9a-f]{24}", tenant)
    with pytest.raises(PermissionDenied):
        keys.check(bearer(ALICE), admin=True)
    for wrong in (None, "", "Basic x", bearer(BOB), bearer(digest_of(ALICE).hex()), bearer("of-the-environment,")):
        with pytest.raises(Unauthenticated):
            keys.check(wrong)
    clock.now_s += 1
    with pytest.raises(Unauthenticated, match="expired"):
        keys.check(bearer(ALICE))


def test_without_keys_everybody_may_do_everything() -> None:
    assert ApiKeys().check(None, admin=True) == ""


def test_the_deployments_own_processes_come_in_and_those_of_another_do_not() -> None:
    identity, other = Identity.parse("k" * 32), Identity.parse("o" * 32)
    keys = ApiKeys(["secret"], identity=identity)
    assert keys.check(bearer(own_key(identity)), admin=True) == OWN_TENANT
    with pytest.raises(Unauthenticated):
        keys.check(bearer(own_key(other)))


def test_a_file_that_changes_changes_the_keys_and_one_that_breaks_does_not(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    clock = Clock()
    first, second = tmp_path / "first", tmp_path / "second"
    first.write_text(str(key_line("a", "user", ALICE)))
    second.write_text(str(key_line("a", "user", BOB)))
    mounted = tmp_path / "keys"
    mounted.symlink_to(first)  # as the kubelet has it
    keys = ApiKeys(file=KeyFile(mounted, clock=clock, wall=lambda: time.time() + 10))
    assert keys.check(bearer(ALICE)) == "a"

    swapped = tmp_path / "new"
    swapped.symlink_to(second)
    os.replace(swapped, mounted)
    assert keys.check(bearer(ALICE)) == "a"  # not looked at for a second
    clock.now_s += 1
    assert keys.check(bearer(BOB)) == "a"
    with pytest.raises(Unauthenticated):
        keys.check(bearer(ALICE))

    for broken in ("nonsense", ""):
        second.write_text(broken)
        clock.now_s += 1
        assert keys.check(bearer(BOB)) == "a"
    second.unlink()
    clock.now_s += 1
    assert keys.check(bearer(BOB)) == "a"
    assert len([r for r in caplog.records if "stay as they are" in r.message]) == 3
    second.write_text(str(key_line("a", "user", ALICE)))
    clock.now_s += 1
    assert keys.check(bearer(ALICE)) == "a"


def test_a_file_that_is_being_written_gives_nobody_more_or_less_until_it_is_whole(tmp_path: Path) -> None:
    """Every first half of it: of a line with limits and an end a shorter one is left, and of the file one without the last keys."""
    clock, wall = Clock(), Clock()
    path = tmp_path / "keys"
    limits = TenantLimits(requests_per_min=60, tokens_per_min=100_000, num_streams=4)
    lines = [str(key_line("b", "user", BOB)), str(key_line("a", "user", ALICE, "2020-01-31", limits))]
    path.write_text(whole := "\n".join(lines))
    file = KeyFile(path, clock=clock, wall=wall)
    keys = ApiKeys(file=file)
    for end in range(0, len(whole), 7):
        path.write_text(whole[:end])
        wall.now_s = path.stat().st_mtime + 0.2
        clock.now_s += 1
        assert keys.check(bearer(BOB)) == "b"
        assert keys.limits("a") == limits
        with pytest.raises(Unauthenticated, match="expired"):
            keys.check(bearer(ALICE))
    path.write_text(lines[0])
    wall.now_s = path.stat().st_mtime + 0.6
    clock.now_s += 1
    with pytest.raises(Unauthenticated, match="not valid"):
        keys.check(bearer(ALICE))


def test_a_file_that_is_none_is_refused_at_the_start(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "gone", tmp_path, tmp_path / "pipe"):
        with pytest.raises(Unavailable, match=re.escape("spec.endpoint.apiKeysFile")):
            KeyFile(path)


def test_the_command_makes_keys_that_come_in(tmp_path: Path) -> None:
    runner, path = CliRunner(), tmp_path / "keys"
    made = runner.invoke(app, ["new", "team-a", "--expires", "90d", "--file", str(path)])
    assert made.exit_code == 0, made.output
    key = made.stdout.split()[1]
    hashed = runner.invoke(app, ["hash", "ops", "--scope", "admin", "-f", str(path)], input=f"{OPS}\n")
    assert hashed.exit_code == 0, hashed.output
    assert path.stat().st_mode & 0o777 == 0o600
    assert key not in path.read_text()
    keys = ApiKeys(file=KeyFile(path))
    assert (keys.check(bearer(key)), keys.check(bearer(OPS), admin=True)) == ("team-a", "ops")
    listed = runner.invoke(app, ["list", str(path)])
    assert [line.split()[:2] for line in listed.stdout.splitlines()] == [["team-a", "user"], ["ops", "admin"]]
    assert isinstance(runner.invoke(app, ["new", "a", "--scope", "root"]).exception, InvalidInput)


def test_the_list_says_what_tenants_may_use(tmp_path: Path) -> None:
    runner, path = CliRunner(), tmp_path / "keys"
    for options in (["a", "--requests", "60", "--streams", "4"], ["b"]):
        assert runner.invoke(app, ["new", *options, "-f", str(path)]).exit_code == 0
    limited, free = runner.invoke(app, ["list", str(path)]).stdout.splitlines()
    assert limited.endswith("for ever  requests=60  streams=4")
    assert free.endswith("for ever")
