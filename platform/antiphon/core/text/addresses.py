"""Addresses that documents name, and hosts that nothing of ours goes to (values; request speed).

On the node's own network clouds keep the node's credentials: who writes a document is not to read them through us. A name is looked
at again where it has become an address, when a connection is there and nothing was sent. Must not know: who connects.
"""

from __future__ import annotations

import socket
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from typing import Final
from urllib.parse import urlsplit

# Of AWS, Alibaba Cloud, Azure and Oracle Cloud; those of others are link-local.
_METADATA: Final = frozenset(map(ip_address, ("fd00:ec2::254", "100.100.100.200", "168.63.129.16", "192.0.0.192")))
_HOLD_IPV4: Final = (ip_network("64:ff9b::/96"), ip_network("::/96"))  # behind NAT64, and as once was written


def check_address(url: str) -> None:
    """Refuse an address with a password in it, and addresses of the node's own network.

    Raises:
        ValueError: so it is, or it has no host.
    """
    parts = urlsplit(url)
    if "@" in parts.netloc:
        raise ValueError("has a user or a password; those belong in a Secret")
    host = parts.hostname
    if not host or parts.port == 0:
        raise ValueError("has no host, or port 0")
    check_host(host)


def check_host(host: str) -> None:
    """Refuse a host that is an address nothing of ours goes to, however it is spelled; names pass.

    Raises:
        ValueError: it is link-local, no host's, or where a cloud keeps credentials.
    """
    try:
        # Also spelled 2852039166 or 0xa9fea9fe, as resolvers take it.
        address = ip_address(host.partition("%")[0]) if ":" in host else ip_address(socket.inet_aton(host.rstrip(".")))
    except (OSError, ValueError):
        return  # a name
    plain = _plain(address)
    if plain.is_link_local or plain.is_multicast or plain.is_unspecified or plain in _METADATA:
        raise ValueError(f"{host} is link-local or no host's address")


def _plain(address: IPv4Address | IPv6Address) -> IPv4Address | IPv6Address:
    """The IPv4 address that an IPv6 one stands for, if it stands for one."""
    if isinstance(address, IPv4Address):
        return address
    if (inner := address.ipv4_mapped or address.sixtofour) is not None:
        return inner
    is_held = int(address) >> 16 and any(address in network for network in _HOLD_IPV4)  # :: and ::1 stand for themselves
    return IPv4Address(int(address) & 0xFFFF_FFFF) if is_held else address
