"""Antiphon under measurement, as its own bench measures it: real worker processes, asked over their engines' sessions.

Started with the checkpoint's directory, a wiring (monolith, 1A1F, ...) and processors (0,1); speaks ``peer_line``.
"""

import sys
from typing import Any

from peer_line import answer, keep_stdout

PRIVATE = keep_stdout()

from antiphon import __version__  # noqa: E402
from antiphon.apps.bench.engine import BenchDeployment  # noqa: E402
from antiphon.apps.bench.setup import BenchSetup  # noqa: E402


class Antiphon:
    """One deployment."""

    def __init__(self, deployment: BenchDeployment) -> None:
        self._deployment = deployment

    def facts(self) -> dict[str, Any]:
        """Version."""
        return {"version": __version__}

    def decode(self, batch: int, num_prompt: int, num_generated: int) -> dict[str, Any]:
        """Steps while all requests decode, with the stage times that the bench adds."""
        line = self._deployment.decode(batch, num_prompt=num_prompt, num_generated=num_generated)
        return {key: value for key, value in line.items() if key not in ("bench", "model", "wiring", "dtype", "batch")}

    def prefill(self, num_prompt: int) -> dict[str, Any]:
        """One prompt to its first token."""
        line = self._deployment.prefill(num_prompt, repeats=1)
        return {"tokens_per_s": line["tokens_per_s"], "ttft_s": line["ttft_s"]}


if __name__ == "__main__":
    cores = tuple(int(core) for core in sys.argv[3].split(","))
    with BenchDeployment(BenchSetup(uri=sys.argv[1], wiring=sys.argv[2], cores=cores)) as running:
        answer(Antiphon(running), PRIVATE)
