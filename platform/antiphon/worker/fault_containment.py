"""Runs steps so that a fault in one ends the request it comes of, found by halving the batch, and nobody else's (step).

Must not know: what a step computes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import torch

from antiphon.core.errors import ErrorInfo, PeerLost
from antiphon.core.step import ModelRunnerOutput
from antiphon.worker.request_row import RequestRow, Scheduled

# The same step is computed in other batches after a fault: answers to an earlier attempt must not be taken for the new one's.
_ATTEMPT_SHIFT = 40
# So many requests in a row ended by a fault, and none got a token between: the worker is to blame, and a new one is started.
_MAX_FAULTS = 8

logger = logging.getLogger(__name__)


class FaultContainment:
    """Owns the count of faults. ``run(exchange_id, batch)`` computes a step; ``abandon`` ends exchanges that it left in flight;
    ``scrub`` zeroes what it wrote of a request to the cache.
    """

    def __init__(
        self,
        run: Callable[[int, Sequence[Scheduled]], ModelRunnerOutput],
        *,
        abandon: Callable[[], None],
        scrub: Callable[[RequestRow], None],
    ) -> None:
        self._run = run
        self._abandon = abandon
        self._scrub = scrub
        self._num_faults = 0  # requests that ended by a fault since one last got a token

    def run(self, step_id: int, batch: Sequence[Scheduled], attempt: int = 0) -> ModelRunnerOutput:
        """One step; a fault in it ends the request it comes of, and nobody else's.

        Raises:
            Exception: the fault, once so many requests in a row ended by one that the worker itself is to blame.
        """
        try:
            with torch.inference_mode():
                output = self._run(step_id | attempt << _ATTEMPT_SHIFT, batch)
        except PeerLost as error:
            self._abandon()
            return ModelRunnerOutput(errors={part.row.request_id: ErrorInfo.of(error) for part in batch})
        except Exception as error:  # noqa: BLE001 - _divide finds out whose it is
            self._abandon()
            return self._divide(step_id, batch, attempt, error)
        self.note(output)
        return output

    def note(self, output: ModelRunnerOutput) -> None:
        """A step went well, here or elsewhere."""
        if output.sampled_token_ids:
            self._num_faults = 0

    def _divide(self, step_id: int, batch: Sequence[Scheduled], attempt: int, error: Exception) -> ModelRunnerOutput:
        if len(batch) == 1 and batch[0].drafts:  # a guess ends nobody
            return self.run(step_id, [batch[0].without_drafts()], 2 * attempt + 1)
        if len(batch) == 1 or any(part.row.kv_target is not None for part in batch):
            # A hand-over has told its asker of layers already: it can't be computed twice, and the asker computes by itself.
            self._num_faults += len(batch)
            if self._num_faults >= _MAX_FAULTS:
                raise error
            logger.error("a step of %d requests failed, they end", len(batch), exc_info=error)
            for part in batch:
                self._scrub(part.row)
            return ModelRunnerOutput(errors={part.row.request_id: ErrorInfo.internal(type(error).__name__) for part in batch})
        middle = len(batch) // 2
        first = self.run(step_id, batch[:middle], 2 * attempt + 1)
        second = self.run(step_id, batch[middle:], 2 * attempt + 2)
        return ModelRunnerOutput(
            sampled_token_ids={**first.sampled_token_ids, **second.sampled_token_ids},
            logprobs={**first.logprobs, **second.logprobs},
            prompt_logprobs={**first.prompt_logprobs, **second.prompt_logprobs},
            vectors={**first.vectors, **second.vectors},
            errors={**first.errors, **second.errors},
        )
