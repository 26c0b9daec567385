"""What an installation is made of: a CycloneDX 1.6 bill of materials, and licences, from the installed metadata (control speed).

    python deploy/supply/sbom.py > antiphon.cdx.json      every package that antiphon needs here, itself first
    python deploy/supply/sbom.py --licences               one line each: package, version, licence

Nothing is fetched. Licences are read as their packages declare them: an SPDX expression where there is one, else the classifier or
the field of old metadata, translated by licences.toml; that file also says which may be used. Must not know: what is built with it.
"""

from __future__ import annotations

import json
import re
import sys
import tomllib
import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement

ROOT = "antiphon"
EXTRAS = ("coe", "plan", "operator", "nixl")  # what is shipped; dev is not
PROJECT = Path(__file__).parents[2] / "pyproject.toml"
TABLE = Path(__file__).with_name("licences.toml")


@dataclass(frozen=True, slots=True, kw_only=True)
class Component:
    """One installed package."""

    name: str
    version: str
    licence: str  # an SPDX expression, or "" where none is known
    needs: tuple[str, ...]  # names, of those that are installed

    @property
    def purl(self) -> str:
        """Its package URL."""
        return f"pkg:pypi/{self.name}@{self.version}"


def components() -> tuple[Component, ...]:
    """antiphon and everything that it needs here, ordered by name, itself first."""
    table = tomllib.loads(TABLE.read_text())
    found: dict[str, Component] = {}
    waiting = [(ROOT, frozenset(EXTRAS))]
    seen = set(waiting)
    while waiting:
        name, extras = waiting.pop()
        try:
            package = distribution(name)
        except PackageNotFoundError:
            continue  # an extra that is not installed here
        needs = []
        for need in _needs(package, extras):
            needs.append(_canonical(need.name))
            item = (_canonical(need.name), frozenset(need.extras))
            if item not in seen:
                seen.add(item)
                waiting.append(item)
        before = found[name].needs if name in found else ()
        found[name] = Component(
            name=name,
            version=package.version,
            licence="Apache-2.0" if name == ROOT else licence_of(package, table),
            needs=tuple(sorted({*before, *needs})),
        )
    installed = [
        Component(name=each.name, version=each.version, licence=each.licence, needs=tuple(n for n in each.needs if n in found))
        for each in found.values()
    ]
    return tuple(sorted(installed, key=lambda each: (each.name != ROOT, each.name)))


def licence_of(package: Distribution, table: dict[str, dict[str, str]]) -> str:
    """The SPDX expression of a package's licence, or ""."""
    name = _canonical(package.metadata["Name"])
    if name in table["packages"]:
        return table["packages"][name]
    expression = package.metadata.get("License-Expression")
    if expression:
        return str(expression)
    classifiers = [c.split(" :: ")[-1] for c in package.metadata.get_all("Classifier") or [] if c.startswith("License :: ")]
    for declared in [*classifiers, str(package.metadata.get("License") or "").strip().split("\n")[0]]:
        if declared in table["names"]:
            return table["names"][declared]
    return ""


def bill(parts: Iterable[Component]) -> dict[str, object]:
    """The document. Equal installations give equal documents."""
    parts = tuple(parts)
    root = parts[0]
    text = json.dumps([(part.purl, part.licence) for part in parts])
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": f"urn:uuid:{uuid.uuid5(uuid.NAMESPACE_URL, text)}",
        "version": 1,
        "metadata": {"component": _shown(root)},
        "components": [_shown(part) for part in parts[1:]],
        "dependencies": [
            {"ref": part.purl, "dependsOn": [other.purl for other in parts if other.name in part.needs]} for part in parts
        ],
    }


def _shown(part: Component) -> dict[str, object]:
    kind = "application" if part.name == ROOT else "library"
    shown: dict[str, object] = {"type": kind, "bom-ref": part.purl, "name": part.name, "version": part.version, "purl": part.purl}
    if part.licence:
        shown["licenses"] = [{"expression": part.licence}]
    return shown


def _needs(package: Distribution, extras: frozenset[str]) -> list[Requirement]:
    if _canonical(package.metadata["Name"]) == ROOT:  # the project says it itself, whatever an editable install was told once
        project = tomllib.loads(PROJECT.read_text())["project"]
        optional = [text for extra in sorted(extras) for text in project["optional-dependencies"][extra]]
        return [Requirement(text) for text in [*project["dependencies"], *optional]]
    found = []
    for text in package.requires or []:
        need = Requirement(text)
        if need.marker is None or any(need.marker.evaluate({"extra": extra}) for extra in ("", *extras)):
            found.append(need)
    return found


def _canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def main() -> None:
    """Print what is asked for."""
    parts = components()
    if "--licences" in sys.argv[1:]:
        for part in parts:
            sys.stdout.write(f"{part.name:40} {part.version:20} {part.licence or '?'}\n")
        return
    sys.stdout.write(json.dumps(bill(parts), indent=1) + "\n")


if __name__ == "__main__":
    main()
