"""What stands behind a request's token ids."""

from __future__ import annotations

import pytest

from antiphon.connectors.kv.handoff import TEXT_BYTES, read_text, write_text

TRACE = "00-" + "1" * 32 + "-" + "2" * 16 + "-01"


@pytest.mark.parametrize("salt", ["", "s", "a\0b", "s\0\0other", "é" * 200])
@pytest.mark.parametrize("tenant", ["", "red"])
def test_a_salt_of_any_characters_leaves_trace_and_tenant_what_they_are(salt: str, tenant: str) -> None:
    assert read_text(write_text(salt, TRACE, tenant).decode()) == (salt, TRACE, tenant)


def test_long_salts_stay_apart_and_push_nothing_out() -> None:
    one, other = (write_text("é" * 1023 + end, TRACE, "red") for end in "ab")
    assert read_text(one.decode())[1:] == (TRACE, "red")
    assert one != other
    assert len(one) < TEXT_BYTES


def test_an_older_askers_text_has_no_tenant() -> None:
    assert read_text(f"s\0{TRACE}") == ("s", TRACE, "")
    assert read_text("s") == ("s", "", "")
