"""What both ends of a link between an attention and an FFN worker agree on before a row flows (control speed).

Must not know: how rows are exchanged.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from antiphon.connectors.afd.rows import RowFormat

CHANNEL = "afd"


def rows_out_bytes(num_rows: int, hidden_size: int, dtype: torch.dtype, experts_per_row: int) -> int:
    """Bytes of the largest A2F payload."""
    return RowFormat(dtype, hidden_size).num_bytes(num_rows, experts_per_row)


def afd_fields(
    *,
    revision: str,
    model_fingerprint: str,
    shard: int,
    num_shards: int,
    hidden_size: int,
    dtype: torch.dtype,
    return_dtype: torch.dtype,
) -> Sequence[tuple[str, str]]:
    """The facts that both ends of an AFD link must agree on."""
    return (
        ("revision", revision),
        ("model", model_fingerprint),
        ("shard", f"{shard}/{num_shards}"),
        ("hidden_size", str(hidden_size)),
        ("a2f_dtype", str(dtype).removeprefix("torch.")),
        ("f2a_dtype", str(return_dtype).removeprefix("torch.")),
    )
