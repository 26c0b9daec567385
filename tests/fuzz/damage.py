"""Good bytes that were damaged, and how many of them are tried."""

from __future__ import annotations

import os
from collections.abc import Sequence

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

EXAMPLES = int(os.environ.get("ANTIPHON_FUZZ_EXAMPLES", "150"))
fuzz = settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))


def damaged(good: bytes) -> st.SearchStrategy[bytes]:
    """``good`` with bits turned, bytes replaced, cut, doubled, or something else altogether."""

    def apply(edits: Sequence[tuple[int, int, bytes]]) -> bytes:
        data = bytearray(good)
        for kind, at, more in edits:
            at %= len(data) + 1
            match kind:
                case 0 if data:
                    data[at % len(data)] ^= 1 << (len(more) % 8)
                case 1:
                    data[at : at + len(more)] = more
                case 2:
                    data[at:at] = more
                case 3:
                    del data[at:]
        return bytes(data)

    edits = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 1 << 16), st.binary(max_size=12)), min_size=1, max_size=6)
    return st.one_of(edits.map(apply), st.binary(max_size=200))
