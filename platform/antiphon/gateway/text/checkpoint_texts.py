"""What a checkpoint's own files say about text: special tokens, ends, chat template, how it wants to be sampled (control speed).

Must not know: how text becomes tokens.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from antiphon.core.errors import CheckpointInvalid
from antiphon.core.text.json_text import read_json_text
from antiphon.gateway.generation.request import SAMPLING_DEFAULTS

_log = logging.getLogger(__name__)

_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


def read_json(path: Path) -> dict[str, Any]:
    """The object of a file; empty where there is none. Raises CheckpointInvalid."""
    if not path.is_file():
        return {}
    try:
        value = read_json_text(_read_text(path))
    except ValueError as error:
        raise CheckpointInvalid(f"{path}: not JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointInvalid(f"{path}: expected an object")
    return value


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointInvalid(f"{path}: not UTF-8: byte {error.start}") from error
    except OSError as error:
        raise CheckpointInvalid(f"{path}: can't be read: {error.strerror or error}") from error


def read_special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """Special tokens of a tokenizer_config.json, by their role."""
    found = {}
    for name in _SPECIAL_TOKENS:
        value = config.get(name)
        if isinstance(value, dict):  # an AddedToken, written out
            value = value.get("content")
        if isinstance(value, str):
            found[name] = value
    return found


def read_eos_token_ids(directory: Path) -> set[int]:
    """Ids that end a text, of the first file that names any. Raises CheckpointInvalid."""
    for name in ("generation_config.json", "config.json"):
        value = read_json(directory / name).get("eos_token_id")
        found = value if isinstance(value, list) else [value]
        if ids := {item for item in found if isinstance(item, int) and not isinstance(item, bool)}:
            return ids  # an empty list says nothing, and leaves it to the next file
    return set()


def read_sampling_defaults(directory: Path) -> dict[str, float]:
    """What generation_config.json says about sampling, by ``Sampling``'s field names; values that make no sense are left out.

    Raises:
        CheckpointInvalid: the file can't be read.
    """
    config = read_json(directory / "generation_config.json")
    found: dict[str, float] = {}
    for name, (least, most) in SAMPLING_DEFAULTS.items():
        value = config.get(name)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
            _log.warning("%s: %s is %r, which is left out: expected %g to %g", directory, name, value, least, most)
            continue
        found[name] = int(value) if name == "top_k" else float(value)
    return found


def read_chat_template(directory: Path, config: Mapping[str, Any]) -> str | None:
    """The chat template's source; None where there is none. Raises CheckpointInvalid."""
    path = directory / "chat_template.jinja"
    if path.is_file():
        return _read_text(path)
    value = config.get("chat_template")
    if isinstance(value, list):  # several by name
        named = {item.get("name"): item.get("template") for item in value if isinstance(item, dict)}
        value = named.get("default")
    return value if isinstance(value, str) else None
