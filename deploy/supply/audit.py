"""Asks OSV whether the pinned packages have published vulnerabilities (control speed). Part of `make lint`.

    python deploy/supply/audit.py        0: none, or no network to ask over, which is said; 1: some, listed

What is known and does not concern antiphon stands in audit.toml with the reason. Must not know: what is installed.
"""

from __future__ import annotations

import sys
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path

import httpx

HERE = Path(__file__).parent
CONSTRAINTS = HERE.parent / "constraints.txt"
IGNORED = HERE / "audit.toml"
URL = "https://api.osv.dev/v1/querybatch"
_TIMEOUT_S = 10.0


def pinned(text: str) -> list[tuple[str, str]]:
    """(name, version) of every pin."""
    lines = (line.partition("#")[0].strip() for line in text.splitlines())
    return [(name, version) for name, separator, version in (line.partition("==") for line in lines) if separator]


def found(client: httpx.Client, pins: Sequence[tuple[str, str]]) -> dict[str, list[str]]:
    """Ids of published vulnerabilities by pin. Raises httpx.HTTPError, ValueError."""
    queries = [{"package": {"name": name, "ecosystem": "PyPI"}, "version": version} for name, version in pins]
    answer = client.post(URL, json={"queries": queries}, timeout=_TIMEOUT_S)
    answer.raise_for_status()
    results = answer.json()["results"]
    if len(results) != len(pins):
        raise ValueError(f"{len(results)} answers to {len(pins)} questions")
    ids = {
        f"{name}=={version}": [v["id"] for v in each.get("vulns", [])] for (name, version), each in zip(pins, results, strict=True)
    }
    return {pin: vulnerabilities for pin, vulnerabilities in ids.items() if vulnerabilities}


def say(line: str) -> None:
    """Onto the terminal."""
    sys.stdout.write(f"{line}\n")


def audit(client: httpx.Client, pins: Sequence[tuple[str, str]], ignored: Mapping[str, str]) -> int:
    """Print what there is; the exit status."""
    try:
        vulnerable = found(client, pins)
    except (httpx.HTTPError, ValueError, KeyError, TypeError) as error:
        say(f"audit: SKIPPED, OSV can't be asked about {len(pins)} packages: {type(error).__name__}: {error}")
        return 0
    left = {pin: [i for i in ids if i not in ignored] for pin, ids in vulnerable.items()}
    for pin, ids in left.items():
        if ids:
            say(f"audit: {pin}: {', '.join(ids)}")
    if any(left.values()):
        return 1
    say(f"audit: {len(pins)} packages, nothing published against them")
    return 0


if __name__ == "__main__":
    with httpx.Client() as http:
        sys.exit(audit(http, pinned(CONSTRAINTS.read_text()), tomllib.loads(IGNORED.read_text())["ignored"]))
