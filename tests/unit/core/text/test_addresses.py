"""Hosts that nothing of ours goes to, however they are spelled."""

from __future__ import annotations

import pytest

from antiphon.core.text.addresses import check_host


@pytest.mark.parametrize(
    "host",
    [
        "169.254.169.254",
        "169.254.169.254.",
        "2852039166",
        "0xa9fea9fe",
        "fe80::1",
        "fe80::1%eth0",
        "::ffff:169.254.169.254",
        "::ffff:a9fe:a9fe",
        "::169.254.169.254",
        "64:ff9b::169.254.169.254",
        "2002:a9fe:a9fe::1",
        "fd00:ec2::254",
        "100.100.100.200",
        "168.63.129.16",
        "192.0.0.192",
        "::ffff:100.100.100.200",
        "0.0.0.0",
        "::",
        "::ffff:0.0.0.0",
        "224.0.0.1",
        "ff02::1",
    ],
)
def test_addresses_of_the_node_are_refused(host: str) -> None:
    with pytest.raises(ValueError, match="link-local"):
        check_host(host)


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "::1", "10.0.0.1", "192.168.0.7", "100.100.100.201", "2001:db8::1", "64:ff9b::8.8.8.8", "law", "law.svc"]
)
def test_others_are_taken(host: str) -> None:
    check_host(host)  # raises ValueError for one that is refused
