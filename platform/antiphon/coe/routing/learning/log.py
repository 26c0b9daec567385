"""Feedbacks on disk, one JSON line each, so that what was learnt outlives its process (control speed).

Prompts and sessions are not in it. A line is written whole; a broken last one, of a process that was killed, is passed over.
Must not know: what is learnt from them.
"""

from __future__ import annotations

import json
import math
from collections import deque
from dataclasses import asdict
from pathlib import Path

from antiphon.coe.routing.learning.online import Feedback
from antiphon.core.errors import CheckpointInvalid
from antiphon.core.text.json_text import read_json_text

MAX_REPLAYED = 100_000  # the newest


def read_feedback(path: Path) -> list[Feedback]:
    """The newest feedbacks of a log, oldest first; none where there is no file yet.

    Raises:
        CheckpointInvalid: it can't be read.
    """
    newest: deque[Feedback] = deque(maxlen=MAX_REPLAYED)
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            for line in file:
                found = _feedback(line)
                if found is not None:
                    newest.append(found)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise CheckpointInvalid(f"feedback log {path} can't be read: {error}") from error
    return list(newest)


def append_feedback(path: Path, feedback: Feedback) -> None:
    """Write one behind the others.

    Raises:
        OSError: it can't be written.
    """
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(asdict(feedback), sort_keys=True) + "\n")


def _feedback(line: str) -> Feedback | None:
    try:
        value = read_json_text(line)
        found = Feedback(
            category=value["category"], expert=value["expert"], expected=float(value["expected"]), score=float(value["score"])
        )
    except (ValueError, KeyError, TypeError):
        return None
    good = isinstance(found.category, str) and isinstance(found.expert, str) and math.isfinite(found.expected)
    return found if good and 0.0 <= found.score <= 1.0 else None
