"""Host and port in addresses (control). Must not know: any transport."""

from __future__ import annotations


def split_host(host: str) -> tuple[str, int]:
    """``host``, ``host:port``, ``[ipv6]:port`` or a bare IPv6 address as (host without brackets, port or 0)."""
    if host.count(":") > 1 and not host.startswith("["):
        return host, 0
    name, colon, port = host.rpartition(":")
    if colon and port.isdigit():
        return name.strip("[]"), int(port)
    return host.strip("[]"), 0


def join_host(host: str, port: int) -> str:
    """``host:port``, with brackets around an IPv6 address."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
