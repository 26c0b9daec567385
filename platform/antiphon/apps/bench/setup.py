"""What is measured: a model, a wiring, and the machine's share it gets, as a document (control speed, values).

Must not know: how anything is started or measured.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from antiphon.core.document.spec import LLMDeployment
from antiphon.core.errors import InvalidInput

SHARED = "@shared"  # behind a wiring: every worker may use all of the processors, rather than a part of them
LEASE_S = 1.0  # records, and the figures in them, are renewed three times as often


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchSetup:
    """What is measured: a model, a wiring such as monolith, P/D, 1A1F, 2A3F or 1A1F@shared, and the machine's share it gets."""

    uri: str
    wiring: str = "monolith"
    dtype: str = "bfloat16"
    cores: tuple[int, ...] = ()  # dealt out to the workers in equal runs; empty = all of this process
    num_ubatches: int | str = "auto"
    transport: str = "auto"
    max_model_len: int = 2048
    max_num_seqs: int = 128
    max_num_batched_tokens: int = 1024
    max_drafts: int | None = None  # speculate, with so many guesses of a request and step at most; None = off
    drafter: Mapping[str, Any] = field(default_factory=dict)  # further fields of the document's speculation section
    trace_steps: bool = False  # every worker keeps what its steps do; see ``BenchDeployment.timeline``

    def document(self) -> LLMDeployment:
        """The deployment document of this set-up."""
        cores = list(self.cores) or sorted(os.sched_getaffinity(0))
        pools = _pools(self.wiring.removesuffix(SHARED))
        num_workers = sum(pool["replicas"] for pool in pools)
        share = max(1, len(cores) // num_workers)
        run = len(cores) if self.wiring.endswith(SHARED) else share
        at = 0
        for pool in pools:
            starts = [at + i * share for i in range(pool["replicas"])]
            pool["cores"] = [cores[(start + i) % len(cores)] for start in starts for i in range(run)]
            pool["threads"] = run
            at += share * pool["replicas"]
        topology = {1: "monolith", 2: "pd" if pools[0]["role"] == "prefill" else "afd", 3: "pd-afd"}[len(pools)]
        return LLMDeployment.model_validate(
            {
                "apiVersion": "serving.antiphon.dev/v1alpha1",
                "kind": "LLMDeployment",
                "metadata": {"name": "bench"},
                "spec": {
                    "model": {"uri": self.uri, "dtype": self.dtype, "maxModelLen": self.max_model_len},
                    "topology": topology,
                    "pools": pools,
                    "transport": {"activations": self.transport, "kv": self.transport, "numUbatches": self.num_ubatches},
                    "scheduler": {
                        "maxNumSeqs": self.max_num_seqs,
                        "maxNumBatchedTokens": self.max_num_batched_tokens,
                        "maxQueuedRequests": 4096,
                    },
                    "cache": {"memory": "1Gi", "prefixCaching": False},
                    "endpoint": {"httpPort": 0, "grpcPort": 0},
                    "directory": {"leaseS": LEASE_S},
                    "speculation": None if self.max_drafts is None else {"maxDrafts": self.max_drafts, **self.drafter},
                },
            }
        )


def _pools(wiring: str) -> list[dict[str, Any]]:
    if wiring == "monolith":
        return [{"name": "monolith", "role": "monolith", "replicas": 1}]
    if wiring == "P/D":
        return [{"name": "prefill", "role": "prefill", "replicas": 1}, {"name": "decode", "role": "decode", "replicas": 1}]
    match = re.fullmatch(r"(P/D\+)?(\d+)A(\d+)F", wiring)
    if match is None:
        raise InvalidInput(
            f"no wiring {wiring!r}; expected monolith, P/D, xAyF (1A1F, 2A3F, ...) or P/D+xAyF, with {SHARED} behind it or not",
            "wiring",
        )
    attention, ffn = int(match[2]), int(match[3])
    pools: list[dict[str, Any]] = [{"name": "prefill", "role": "prefill", "replicas": 1}] if match[1] else []
    pools.append({"name": "attention", "role": "attention", "replicas": attention})
    pools.append({"name": "ffn", "role": "ffn", "replicas": ffn, "parallelism": {"tensor": ffn}})
    return pools
