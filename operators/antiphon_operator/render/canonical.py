"""One spelling for one value, and its fingerprint (control speed, pure).

Must not know: what is rendered.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

import yaml

# libyaml where PyYAML was built with it: the same values, an order of magnitude faster.
_SAFE_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_SAFE_DUMPER: Any = getattr(yaml, "CSafeDumper", yaml.SafeDumper)

Json = dict[str, Any]


def canonical(value: Any) -> str:
    """``value`` as JSON that does not depend on the order of keys."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def literal(text: str) -> str:
    """``text`` for a container's arguments and variables, where $(NAME) would become what the variable has: a Secret, say."""
    return text.replace("$", "$$")


def fingerprint(value: Any, length: int = 10) -> str:
    """``length`` hexadecimal digits that change when ``value`` does."""
    return hashlib.sha256(canonical(value).encode()).hexdigest()[:length]


def to_yaml(value: Any) -> str:
    """``value`` as YAML that does not depend on the order of keys."""
    return str(yaml.dump(value, Dumper=_SAFE_DUMPER, sort_keys=True, default_flow_style=False, allow_unicode=True, width=4096))


def parse_yaml(text: str) -> Any:
    """The value of a YAML text, of plain types only.

    Raises:
        yaml.YAMLError: it is no YAML.
    """
    return yaml.load(text, Loader=_SAFE_LOADER)  # noqa: S506 - one of the two safe loaders
