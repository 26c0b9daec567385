import pytest

from antiphon.transport.connect.address import join_host, split_host


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [
        ("10.0.0.1", "10.0.0.1", 0),
        ("10.0.0.1:80", "10.0.0.1", 80),
        ("worker.svc", "worker.svc", 0),
        ("::1", "::1", 0),
        ("[::1]", "::1", 0),
        ("[::1]:80", "::1", 80),
    ],
)
def test_hosts_are_split_from_their_ports(text: str, host: str, port: int) -> None:
    assert split_host(text) == (host, port)


def test_ipv6_addresses_are_joined_with_brackets() -> None:
    assert join_host("::1", 80) == "[::1]:80"
    assert join_host("10.0.0.1", 80) == "10.0.0.1:80"
