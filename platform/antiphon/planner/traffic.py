"""What the requests look like: prompt and output lengths, and the decode contexts that follow from them (pure values).

A decode step sees token-weighted contexts: a request of prompt P and output O contributes O rows at contexts P .. P+O. Must not
know: models or hardware.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from antiphon.core.errors import InvalidInput
from antiphon.planner.bounds import checked, count, number, parse_json, read_text

DEFAULT_OUTPUT_TOKENS = 512
MAX_POINTS = 32  # prompt lengths that stand for all of a trace's


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestShape:
    """One kind of request, ``weight`` times as frequent as one of weight 1; ``arrival_s`` is known from traces."""

    prompt_tokens: int
    output_tokens: int
    weight: float = 1.0
    arrival_s: float | None = None


@dataclass(frozen=True, slots=True)
class Traffic:
    """A distribution of requests."""

    requests: tuple[RequestShape, ...]

    @classmethod
    def of(cls, requests: Sequence[RequestShape]) -> Traffic:
        """Check and keep.

        Raises:
            InvalidInput: there are none, or one has no prompt, no output or no weight.
        """
        if not requests:
            raise InvalidInput("there are no requests to plan for", "traffic")
        for request in requests:
            checked("prompt_tokens", request.prompt_tokens, "traffic.prompt_tokens")
            checked("output_tokens", request.output_tokens, "traffic.output_tokens")
            checked("weight", request.weight, "traffic.weight")
        return cls(tuple(requests))

    @classmethod
    def at_context(cls, context: float, output_tokens: int | None = None) -> Traffic:
        """Equal requests whose decode rows see ``context`` tokens on average; without ``output_tokens``, answers of 512 or fewer.

        Raises:
            InvalidInput: answers so long see more than ``context`` on average, whatever the prompt.
        """
        output = max(1, min(DEFAULT_OUTPUT_TOKENS, int(context))) if output_tokens is None else output_tokens
        if output > max(1.0, 2 * (context - 1)):
            raise InvalidInput(
                f"output_tokens: answers of {output:,} tokens see a context of {1 + output / 2:,.0f} or more on average, "
                f"not of {context:,.0f}; raise context, or give prompt_tokens instead",
                "output_tokens",
            )
        return cls.of([RequestShape(prompt_tokens=max(1, round(context - output / 2)), output_tokens=output)])

    @classmethod
    def from_trace(cls, path: Path) -> Traffic:
        """Requests of a trace: CSV with a header or JSON lines, fields prompt_tokens, output_tokens and maybe arrival_s.

        Raises:
            InvalidInput: the file can't be read, or a line lacks a field; the message names the line.
        """
        lines = [line for line in read_text(path, "trace").splitlines() if line.strip()]
        if lines and lines[0].lstrip().startswith("{"):
            rows = [parse_json(line, f"{path}, line {at}", "trace") for at, line in enumerate(lines, start=1)]
            return cls.of([_request(row, f"{path}, line {at}") for at, row in enumerate(rows, start=1)])
        try:
            table = list(csv.DictReader(lines))
        except csv.Error as error:
            raise InvalidInput(f"{path}: {error}", "trace") from error
        return cls.of([_request(row, f"{path}, line {at}") for at, row in enumerate(table, start=2)])

    def _mean(self, values: Sequence[float]) -> float:
        weights = [request.weight for request in self.requests]
        return sum(weight * value for weight, value in zip(weights, values, strict=True)) / sum(weights)

    @property
    def mean_prompt(self) -> float:
        """Tokens."""
        return self._mean([request.prompt_tokens for request in self.requests])

    @property
    def mean_output(self) -> float:
        """Tokens."""
        return self._mean([request.output_tokens for request in self.requests])

    @property
    def longest(self) -> int:
        """Prompt and output of the longest request, in tokens."""
        return max(request.prompt_tokens + request.output_tokens for request in self.requests)

    def prompt_quantile(self, share: float) -> int:
        """Prompt length that ``share`` of the requests don't exceed."""
        ordered = sorted(self.requests, key=lambda request: request.prompt_tokens)
        wanted, seen = share * sum(request.weight for request in ordered), 0.0
        for request in ordered:
            seen += request.weight
            if seen >= wanted - 1e-12:
                return request.prompt_tokens
        return ordered[-1].prompt_tokens

    @property
    def prompt_points(self) -> tuple[tuple[int, float], ...]:
        """Prompt lengths with their shares: all of them when there are few, else medians of equal parts."""
        shares: dict[int, float] = {}
        total = sum(request.weight for request in self.requests)
        for request in self.requests:
            shares[request.prompt_tokens] = shares.get(request.prompt_tokens, 0.0) + request.weight / total
        if len(shares) <= MAX_POINTS:
            return tuple(sorted(shares.items()))
        middles = [(index + 0.5) / MAX_POINTS for index in range(MAX_POINTS)]
        return tuple((self.prompt_quantile(middle), 1 / MAX_POINTS) for middle in middles)

    @property
    def mean_context(self) -> float:
        """Context that a decode row sees on average, in tokens: E[P O + O^2 / 2] / E[O]."""
        area = [r.output_tokens * (r.prompt_tokens + r.output_tokens / 2) for r in self.requests]
        return self._mean(area) / self.mean_output

    @property
    def context_deviation(self) -> float:
        """Standard deviation of the contexts of decode rows, in tokens."""
        squares = [
            r.output_tokens * (r.prompt_tokens**2 + r.prompt_tokens * r.output_tokens + r.output_tokens**2 / 3)
            for r in self.requests
        ]
        return math.sqrt(max(0.0, self._mean(squares) / self.mean_output - self.mean_context**2))


def _request(row: Any, where: str) -> RequestShape:
    if not isinstance(row, dict):
        raise InvalidInput(f"{where}: is no JSON object", "trace")
    for name in ("prompt_tokens", "output_tokens"):
        if row.get(name) is None:
            raise InvalidInput(f"{where}: has no {name}", "trace")
    arrival = row.get("arrival_s")
    return RequestShape(
        prompt_tokens=count(row["prompt_tokens"], "prompt_tokens", f"{where}, prompt_tokens"),
        output_tokens=count(row["output_tokens"], "output_tokens", f"{where}, output_tokens"),
        arrival_s=None if arrival in (None, "") else number(arrival, "arrival_s", f"{where}, arrival_s"),
    )
