"""The fields that say how tokens are chosen, with their ranges: the one place of them, for every door (request speed).

Must not know: which door, HTTP, tokenizers or workers.
"""

from __future__ import annotations

import re
from typing import Annotated, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from antiphon.core.errors import InvalidInput
from antiphon.gateway.generation.request import MAX_STOP_CHARS, SAMPLING_DEFAULTS, Sampling

_T = TypeVar("_T")

MAX_TOKEN_ID = 2**31 - 1
MAX_LOGIT_BIASES = 1024
_TOKEN_ID = re.compile(r"[0-9]{1,10}")
_SMALLEST_TOP_P = 1e-6  # 0 is taken as this: the most probable token alone


def value_or(value: _T | None, default: _T) -> _T:
    """``value``, or ``default`` where it is absent."""
    return default if value is None else value


def _as_token_biases(value: object) -> object:
    if not isinstance(value, dict):
        return value
    # Before a key becomes a number: equal hashes of numbers can be chosen, and each costs a look at all the others.
    if len(value) > MAX_LOGIT_BIASES:
        raise ValueError(f"{len(value)} tokens are more than {MAX_LOGIT_BIASES}")
    if not all(isinstance(key, int) or _TOKEN_ID.fullmatch(key) for key in value):
        raise ValueError("keys must be token ids")
    biases = {int(key): bias for key, bias in value.items()}
    if len(biases) != len(value):
        raise ValueError("a token is there twice, by two spellings of its id")
    return biases


TokenId = Annotated[int, Field(ge=0, le=MAX_TOKEN_ID)]
Stop = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]
Finite = Annotated[float, Field(allow_inf_nan=False)]


class SamplingFields(BaseModel):
    """How tokens are chosen."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    max_tokens: int | None = Field(default=None, ge=1, le=MAX_TOKEN_ID)
    temperature: Finite | None = Field(default=None, ge=0, le=2)
    top_p: Finite | None = Field(default=None, ge=0, le=1)
    top_k: int | None = Field(default=None, ge=-1, le=MAX_TOKEN_ID)
    min_p: Finite | None = Field(default=None, ge=0, le=1)
    presence_penalty: Finite | None = Field(default=None, ge=-2, le=2)
    frequency_penalty: Finite | None = Field(default=None, ge=-2, le=2)
    repetition_penalty: Finite | None = Field(default=None, gt=0, le=10)
    logit_bias: Annotated[dict[TokenId, Annotated[Finite, Field(ge=-100, le=100)]] | None, BeforeValidator(_as_token_biases)] = (
        Field(default=None, max_length=MAX_LOGIT_BIASES)
    )
    seed: int | None = Field(default=None, ge=-(2**63), le=2**64 - 1)
    stop_token_ids: list[TokenId] | None = Field(default=None, max_length=1024)
    min_tokens: int | None = Field(default=None, ge=0, le=MAX_TOKEN_ID)
    ignore_eos: bool | None = None
    speculation: Literal["auto", "off"] | None = None

    def sampling(self, *, max_tokens: int | None, num_logprobs: int | None, num_prompt_logprobs: int | None = None) -> Sampling:
        """The values, with defaults for what is absent.

        Raises:
            InvalidInput: min_tokens is above max_tokens.
        """
        min_tokens = value_or(self.min_tokens, 0)
        if max_tokens is not None and min_tokens > max_tokens:
            raise InvalidInput(f"min_tokens is {min_tokens}, above max_tokens, {max_tokens}", "min_tokens")
        return Sampling(
            max_tokens=max_tokens,
            temperature=value_or(self.temperature, 1.0),
            top_p=max(_SMALLEST_TOP_P, value_or(self.top_p, 1.0)),
            top_k=max(0, value_or(self.top_k, 0)),
            min_p=value_or(self.min_p, 0.0),
            presence_penalty=value_or(self.presence_penalty, 0.0),
            frequency_penalty=value_or(self.frequency_penalty, 0.0),
            repetition_penalty=value_or(self.repetition_penalty, 1.0),
            logit_bias=value_or(self.logit_bias, {}),
            seed=None if self.seed is None else self.seed % 2**64,
            stop_token_ids=frozenset(value_or(self.stop_token_ids, [])),
            min_tokens=min_tokens,
            ignore_eos=value_or(self.ignore_eos, False),
            num_logprobs=num_logprobs,
            unset=frozenset(name for name in SAMPLING_DEFAULTS if getattr(self, name) is None),
            num_prompt_logprobs=num_prompt_logprobs,
            speculates=self.speculation != "off",
        )
