"""Chooses the next token of every request from its logits (hot).

Greedy rows without penalties take one argmax together, and draws one call of the compiled kernel (without it, one row at a time in
torch); only penalties and biases are worked out row by row. A draw inverts the cumulative distribution at one uniform number that
depends on (seed, position) only, so the same seed gives the same tokens in any batch and any topology.

Legend: R rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch

from antiphon.core.request import SamplingParams, TokenLogprob
from antiphon.models.native.library import available
from antiphon.worker.cards.drawing import Draw
from antiphon.worker.structure.grammar import Matcher
from antiphon.worker.structure.thinking import ThinkingMeter

_MASK64 = (1 << 64) - 1
_LIKELIHOOD_ROWS = 32  # of a prompt's logits at once: 6 MB at a vocabulary of 49k
_TOP_P_FIRST_LOOK = 1024  # nearly always holds top_p of the mass; sorting a whole vocabulary costs milliseconds


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1), a pure function of its arguments: SplitMix64 (Steele et al., OOPSLA 2014) over both."""
    state = (seed + (position + 1) * 0x9E3779B97F4A7C15) & _MASK64
    for _ in range(2):  # twice, so that neighbouring seeds share nothing
        state = (state + 0x9E3779B97F4A7C15) & _MASK64
        mixed = state
        mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
        mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & _MASK64
        state = mixed ^ (mixed >> 31)
    return (state >> 11) * 2.0**-53


class SamplingState:
    """What one request's sampling remembers between steps."""

    __slots__ = (
        "_bias", "_counts_V", "_matcher", "_meter", "_prompt_V", "end_ids", "needs_best_only", "params", "plain_greedy"
    )  # fmt: skip

    def __init__(
        self,
        params: SamplingParams,
        end_ids: frozenset[int],
        prompt: Sequence[int],
        output: Sequence[int],
        vocab: int,
        *,
        matcher: Matcher | None = None,
        meter: ThinkingMeter | None = None,
    ) -> None:
        """``matcher`` and ``meter`` stand after ``output``; they enforce ``params.rules``."""
        self.params = params
        self._matcher = matcher
        self._meter = meter
        self.end_ids = sorted(i for i in end_ids | params.stop_token_ids if i < vocab)
        penalised = params.presence_penalty != 0.0 or params.frequency_penalty != 0.0 or params.repetition_penalty != 1.0
        is_free = matcher is None and meter is None
        self.plain_greedy = params.greedy and not penalised and not params.logit_bias and params.min_tokens == 0 and is_free
        self.needs_best_only = self.plain_greedy and params.num_logprobs is None
        self._prompt_V: torch.Tensor | None = None
        self._counts_V: torch.Tensor | None = None
        if penalised:
            self._counts_V = torch.zeros(vocab, dtype=torch.float32)
            self._prompt_V = torch.zeros(vocab, dtype=torch.bool)
            self._prompt_V[torch.tensor(list(prompt), dtype=torch.int64)] = True
            for token_id in output:
                self._counts_V[token_id] += 1
        bias = {token_id: value for token_id, value in params.logit_bias.items() if token_id < vocab}
        self._bias = (torch.tensor(list(bias)), torch.tensor(list(bias.values()))) if bias else None

    def append(self, token_id: int) -> None:
        """A token was chosen."""
        if self._counts_V is not None:
            self._counts_V[token_id] += 1
        if self._matcher is not None:
            self._matcher.append(token_id)
        if self._meter is not None:
            self._meter.append(token_id)

    def draw_at(self, position: int) -> Draw | None:
        """The draw as a card makes it where it depends on logits and seed alone; None = ``sample`` chooses."""
        p = self.params
        if not p.draws_from_logits_alone(position):
            return None
        point = 0.0 if p.greedy else uniform(p.seed, position)
        return Draw(point=point, temperature=p.temperature, top_k=p.top_k, top_p=p.top_p, min_p=p.min_p)

    @property
    def failure(self) -> str | None:
        """Why no further token can be chosen by the rules, if none can."""
        return None if self._matcher is None else self._matcher.failure

    def changes(self, position: int) -> bool:
        """Whether ``adjust`` would change logits at this position."""
        has_rules = self._matcher is not None or (self._meter is not None and self._meter.forced is not None)
        return has_rules or self._counts_V is not None or self._bias is not None or position < self.params.min_tokens

    def adjust(self, logits_V: torch.Tensor, position: int) -> torch.Tensor:
        """Penalties, bias, the mask of min_tokens and what the rules allow; a new tensor."""
        params = self.params
        if self._counts_V is None and self._bias is None and position >= params.min_tokens:
            return self._obey(logits_V)
        out = logits_V.clone()
        if self._counts_V is not None and self._prompt_V is not None:
            if params.repetition_penalty != 1.0:
                seen = self._prompt_V | (self._counts_V > 0)
                scaled = torch.where(out < 0, out * params.repetition_penalty, out / params.repetition_penalty)
                out = torch.where(seen, scaled, out)
            out -= params.frequency_penalty * self._counts_V + params.presence_penalty * (self._counts_V > 0)
        if self._bias is not None:
            out.index_add_(0, self._bias[0], self._bias[1])
        if position < params.min_tokens and self.end_ids:
            out[self.end_ids] = float("-inf")
        return self._obey(out)

    def _obey(self, logits_V: torch.Tensor) -> torch.Tensor:
        """What the rules allow of logits, which stay as they are."""
        forced = None if self._meter is None else self._meter.forced
        if forced is not None:
            out_V = torch.full_like(logits_V, float("-inf"))
            out_V[forced] = logits_V[forced] if bool(torch.isfinite(logits_V[forced])) else 0.0
            return out_V
        return logits_V if self._matcher is None else keep_allowed(logits_V, self._matcher.allowed())


def keep_allowed(logits_V: torch.Tensor, allowed: npt.NDArray[np.uint8]) -> torch.Tensor:
    """Logits with -inf where a token's bit is not set, lowest bit first; a new tensor."""
    if logits_V.device.type == "cpu" and logits_V.dtype is torch.float32 and available():
        kept_V: torch.Tensor = torch.ops.antiphon.keep_allowed(logits_V.contiguous(), torch.from_numpy(allowed))
        return kept_V
    bits_V = torch.from_numpy(np.unpackbits(allowed, count=logits_V.numel(), bitorder="little").view(np.bool_))
    return torch.where(bits_V.to(logits_V.device), logits_V, float("-inf"))


def all_finite(x_TD: torch.Tensor) -> bool:
    """Whether rows are numbers: their sum tells, without a mask of them."""
    return bool(torch.isfinite(x_TD.sum(dtype=torch.float32)))


def numbers_only(ids_R: torch.Tensor, values_R: torch.Tensor) -> list[int | None]:
    """The most likely tokens of rows; None where the logit is not a number."""
    chosen: list[int | None] = list(ids_R.tolist())
    if not bool(torch.isfinite(values_R).all()):
        for row, finite in enumerate(torch.isfinite(values_R).tolist()):
            if not finite:
                chosen[row] = None
    return chosen


def sample(logits_RV: torch.Tensor, states: Sequence[SamplingState], positions: Sequence[int]) -> list[int | None]:
    """One token per row; None where the logits are non-finite. ``positions``: output tokens so far, per row."""
    if logits_RV.device.type != "cpu":  # drawn as on a CPU, so that seeds give the same tokens wherever the logits were computed
        logits_RV = logits_RV.cpu()
    greedy_R = logits_RV.argmax(dim=-1)
    best_R = logits_RV.gather(1, greedy_R[:, None]).squeeze(1)
    bad = torch.isnan(best_R) | torch.isinf(best_R)
    chosen: list[int | None] = list(greedy_R.tolist())
    is_bad = bad.tolist()
    drawn: list[int] = []
    changed: dict[int, torch.Tensor] = {}
    for row, state in enumerate(states):
        if is_bad[row]:
            chosen[row] = None
            continue
        if state.plain_greedy:
            continue
        logits_V = state.adjust(logits_RV[row], positions[row]) if state.changes(positions[row]) else None
        if state.failure is not None:
            chosen[row] = None
        elif state.params.greedy:
            chosen[row] = chosen[row] if logits_V is None else int(logits_V.argmax())
        else:
            drawn.append(row)
            if logits_V is not None:
                changed[row] = logits_V
    for row, token_id in zip(drawn, _draw_all(logits_RV, drawn, changed, states, positions), strict=True):
        chosen[row] = token_id
    return chosen


def _draw_all(
    logits_RV: torch.Tensor,
    rows: Sequence[int],
    changed: Mapping[int, torch.Tensor],
    states: Sequence[SamplingState],
    positions: Sequence[int],
) -> list[int]:
    """A token for each of ``rows``, from its logits or, where it has them, its changed ones."""
    if not rows:
        return []
    if not (available() and logits_RV.device.type == "cpu" and logits_RV.dtype is torch.float32):
        return [_draw(changed.get(row, logits_RV[row]), states[row].params, positions[row]) for row in rows]
    place = {row: logits_RV.shape[0] + index for index, row in enumerate(changed)}  # of changed logits, behind the others
    settings = [(p.temperature, p.top_p, p.min_p, uniform(p.seed, positions[row])) for row in rows if (p := states[row].params)]
    drawn: list[int] = torch.ops.antiphon.draw(
        logits_RV.contiguous(),
        list(changed.values()),
        torch.tensor([place.get(row, row) for row in rows]),
        torch.tensor(settings, dtype=torch.float64),
        torch.tensor([states[row].params.top_k for row in rows]),
    ).tolist()
    return drawn


def _draw(logits_V: torch.Tensor, params: SamplingParams, position: int) -> int:
    logits_V = logits_V / params.temperature
    if 0 < params.top_k < logits_V.numel():
        kth = torch.topk(logits_V, params.top_k).values[-1]
        logits_V = logits_V.masked_fill(logits_V < kth, float("-inf"))
    probs_V = torch.softmax(logits_V, dim=-1)
    keep_V = torch.ones_like(probs_V, dtype=torch.bool)
    if params.top_p < 1.0:
        keep_V &= _top_p(probs_V, params.top_p)
    if params.min_p > 0.0:
        keep_V &= probs_V >= params.min_p * probs_V.max()
    cumulative_V = (probs_V * keep_V).cumsum(0, dtype=torch.float64)
    point = uniform(params.seed, position) * float(cumulative_V[-1])
    index = int(torch.searchsorted(cumulative_V, point, right=True))
    if index >= probs_V.numel():  # rounding at the very end of the distribution
        index = int(keep_V.nonzero()[-1])
    return index


def _top_p(probs_V: torch.Tensor, top_p: float) -> torch.Tensor:
    """The smallest set of most probable tokens with ``top_p`` of the mass (arXiv 1904.09751), as a mask; of equals the first."""
    looked_at = min(_TOP_P_FIRST_LOOK, probs_V.numel())
    while True:
        values = torch.topk(probs_V, looked_at).values
        before = values.cumsum(0) - values  # mass of the more probable ones
        if float(before[-1]) >= top_p or looked_at == probs_V.numel():
            num_kept = max(1, int((before < top_p).sum()))
            least = values[num_kept - 1]
            mask_V = probs_V > least
            mask_V[(probs_V == least).nonzero()[: num_kept - int(mask_V.sum()), 0]] = True
            return mask_V
        looked_at = probs_V.numel()


def prompt_logprobs(
    logits_of: Callable[[torch.Tensor], torch.Tensor], x_TD: torch.Tensor, token_ids: Sequence[int], first: int, num_top: int
) -> dict[int, TokenLogprob]:
    """Log-probabilities of the prompt's tokens at positions from ``first`` on, each from the row of the one before it; a few rows
    of logits at a time, and no more once a row is none of numbers.
    """
    noted: dict[int, TokenLogprob] = {}
    for start in range(0, x_TD.shape[0], _LIKELIHOOD_ROWS):
        logits_TV = logits_of(x_TD[start : start + _LIKELIHOOD_ROWS])
        if not all_finite(logits_TV):
            break  # the request ends with an error of its own
        for offset, logits_V in enumerate(logits_TV):
            position = first + start + offset
            noted[position] = logprobs_of(logits_V, token_ids[position], num_top)
    return noted


def logprobs_of(logits_V: torch.Tensor, token_id: int, num_top: int) -> TokenLogprob:
    """Log-probabilities under the model's own distribution, before penalties and temperature."""
    logprobs_V = torch.log_softmax(logits_V, dim=-1)
    chosen = logprobs_V[token_id]
    top: tuple[tuple[int, float], ...] = ()
    if num_top > 0:
        values, indices = torch.topk(logprobs_V, min(num_top, logprobs_V.numel()))
        top = tuple(zip(indices.tolist(), values.tolist(), strict=True))
    return TokenLogprob(token_id=token_id, logprob=float(chosen), rank=int((logprobs_V > chosen).sum()), top=top)
