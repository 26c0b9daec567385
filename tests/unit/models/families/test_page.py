"""The page that says how to add a family says what is so."""

from __future__ import annotations

import re
from pathlib import Path

from antiphon.core.document.spec import LLMDeploymentSpec

ROOT = Path(__file__).parents[4]
PAGE = (ROOT / "deploy/docs/families.md").read_text(encoding="utf-8")
FAMILIES = ROOT / "platform/antiphon/models/families"


def test_the_family_shown_is_all_of_its_file() -> None:
    (shown,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    whole = (FAMILIES / "olmo2.py").read_text(encoding="utf-8")
    assert shown.strip() in whole
    (num_lines,) = re.findall(r"OLMo 2 \((\d+) lines", PAGE)
    assert len(whole.splitlines()) == int(num_lines)


def test_the_files_it_names_are_there() -> None:
    for name in re.findall(r"`((?:platform|tests)/[\w/.]+\.py)`", PAGE):
        assert (ROOT / name).is_file(), name
    for name in re.findall(r"`((?:families|models)/[\w/]+\.py)`", PAGE):
        assert (ROOT / "platform/antiphon" / name).is_file() or (FAMILIES.parent / name).is_file(), name


def test_the_fields_it_names_are_in_the_document() -> None:
    experts = LLMDeploymentSpec.model_fields["experts"].annotation
    assert experts is not None
    fields = {field.alias for field in experts.model_fields.values()}
    for name in re.findall(r"\| `experts\.(\w+)", PAGE):
        assert name in fields, name
