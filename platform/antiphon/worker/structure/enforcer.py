"""Rules of outputs to the machines that enforce them, for one worker's model (request speed; a look-up at step speed).

``prepare`` does the slow part (a vocabulary, a grammar) away from the loop that steps; ``begin`` then only copies. Must not know:
logits, batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from antiphon.core.request import OutputRules, Request
from antiphon.worker.structure.grammar import Grammars, Matcher
from antiphon.worker.structure.thinking import ThinkingMeter


class Enforcer:
    """Begins the enforcement of one output's rules. Any thread may use it.

    Args:
        checkpoint: directory with the tokenizer.
        vocab_size: of the model.
    """

    def __init__(self, checkpoint: Path, vocab_size: int) -> None:
        self._grammars = Grammars(checkpoint / "tokenizer.json", vocab_size)

    def prepare(self, request: Request) -> None:
        """Make a request's rules ready, so that ``begin`` is quick.

        Raises:
            InvalidInput: its grammar does not compile, or its output so far is not of it.
        """
        if request.sampling.rules is not None:
            self.begin(request.sampling.rules, request.eos_token_ids, request.output_token_ids)

    def begin(
        self, rules: OutputRules, end_ids: frozenset[int], output: Sequence[int]
    ) -> tuple[Matcher | None, ThinkingMeter | None]:
        """What holds an output to its rules, standing after ``output``."""
        matcher = None if rules.grammar is None else self._grammars.matcher(rules.grammar, end_ids, output)
        thinking = rules.thinking
        meter = None if thinking is None else ThinkingMeter(thinking, self._grammars.token_bytes(end_ids), output)
        return matcher, meter
