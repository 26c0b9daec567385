"""Reservations and the ledger in Redis; each step is one script, so that gateways never see half of one (control speed).

    antiphon:{directory}:budget:<tenant>   hash: o:<ticket> = tokens:end of the lease in ms, r:<second>, t:<second> = counts
    antiphon:{directory}:use:<day>         hash: JSON of tenant, model and field = count; kept for 400 days
    antiphon:{directory}:used:<batch>      a batch that is in the ledger; kept for an hour

A script decides as ``core.budget.judge`` does; a test compares the two. Time is Redis' own. Must not know: who asks.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final

import redis.asyncio as redis

from antiphon.core.budget import (
    KEPT_DAYS,
    MAX_RENEWED,
    MAX_RESERVATIONS,
    WINDOW_S,
    Use,
    Verdict,
    Wish,
    check_tokens,
    check_uses,
    check_wish,
    judge,
)
from antiphon.core.directory import check_lease, check_names
from antiphon.core.errors import InvalidInput
from antiphon.core.text.json_text import read_json_text

_FIELDS: Final = ("num_requests", "num_prompt_tokens", "num_cached_tokens", "num_output_tokens")

# Shared beginning. KEYS the account. Leaves: now (s), now_ms, window (list of second, kind, count), reserved, open.
_TIDY = f"""
local found = redis.call('TYPE', KEYS[1]).ok
if found ~= 'hash' and found ~= 'none' then redis.call('DEL', KEYS[1]) end
local time = redis.call('TIME')
local now = tonumber(time[1])
local now_ms = now * 1000 + math.floor(tonumber(time[2]) / 1000)
local all = redis.call('HGETALL', KEYS[1])
local open, reserved, requests, tokens = 0, 0, 0, 0
local function count(kind, second, number)
  if second < now - {WINDOW_S} then return end
  if kind == 'r' then requests = requests + number else tokens = tokens + number end
end
for i = 1, #all, 2 do
  local kind, name = string.sub(all[i], 1, 1), string.sub(all[i], 3)
  if kind == 'o' then
    local held, till = string.match(all[i + 1], '^(%d+):(%d+)$')
    held, till = tonumber(held or ''), tonumber(till or '')
    if not till then
      redis.call('HDEL', KEYS[1], all[i]) -- nobody of ours wrote it
    elseif till <= now_ms then
      redis.call('HDEL', KEYS[1], all[i])
      local second = math.floor(till / 1000)
      if second >= now - {WINDOW_S} then redis.call('HINCRBY', KEYS[1], 't:' .. second, held) end
      count('t', second, held)
    else
      open, reserved = open + 1, reserved + held
    end
  elseif not tonumber(name) or not string.match(all[i + 1], '^%d+$') or tonumber(name) < now - {WINDOW_S} then
    redis.call('HDEL', KEYS[1], all[i])
  else
    count(kind, tonumber(name), tonumber(all[i + 1]))
  end
end
"""

# ARGV ticket, tokens, lease_ms, requests, tokens and streams at most (-1 = any). Answers whether it is granted; if not, why.
_TAKE = (
    _TIDY
    + f"""
local field = 'o:' .. ARGV[1]
if redis.call('HEXISTS', KEYS[1], field) == 0 then
  local function over(number, most) return tonumber(most) >= 0 and number > tonumber(most) end
  if over(open + 1, ARGV[6]) or open >= {MAX_RESERVATIONS} or over(requests + 1, ARGV[4])
      or over(tokens + reserved + tonumber(ARGV[2]), ARGV[5]) then
    return {{0, now_ms, open, reserved, redis.call('HGETALL', KEYS[1])}}
  end
  redis.call('HINCRBY', KEYS[1], 'r:' .. now, 1)
end
redis.call('HSET', KEYS[1], field, ARGV[2] .. ':' .. string.format('%.0f', now_ms + tonumber(ARGV[3])))
local left = redis.call('PTTL', KEYS[1])
if left < tonumber(ARGV[3]) + 120000 then redis.call('PEXPIRE', KEYS[1], tonumber(ARGV[3]) + 120000) end
return {{1, now_ms, 0, 0, {{}}}}
"""
)

# ARGV ticket, tokens
_SETTLE = (
    _TIDY
    + """
if redis.call('HDEL', KEYS[1], 'o:' .. ARGV[1]) == 1 then
  redis.call('HINCRBY', KEYS[1], 't:' .. now, ARGV[2])
  if redis.call('PTTL', KEYS[1]) < 120000 then redis.call('PEXPIRE', KEYS[1], 120000) end
end
"""
)

# ARGV lease_ms, tickets
_RENEW = (
    _TIDY
    + """
local till = string.format('%.0f', now_ms + tonumber(ARGV[1]))
for i = 2, #ARGV do
  local held = redis.call('HGET', KEYS[1], 'o:' .. ARGV[i])
  if held then redis.call('HSET', KEYS[1], 'o:' .. ARGV[i], string.match(held, '^%d+') .. ':' .. till) end
end
if redis.call('PTTL', KEYS[1]) < tonumber(ARGV[1]) + 120000 then redis.call('PEXPIRE', KEYS[1], tonumber(ARGV[1]) + 120000) end
"""
)

# KEYS the day, the batch; ARGV seconds that the day is kept, field, count, field, count ...
_ADD = """
if redis.call('SET', KEYS[2], 1, 'NX', 'EX', 3600) then
  for i = 2, #ARGV, 2 do redis.call('HINCRBY', KEYS[1], ARGV[i], ARGV[i + 1]) end
  redis.call('EXPIRE', KEYS[1], ARGV[1])
end
"""


class RedisBudgets:
    """Over a Redis' client that is its owner's to close.

    Args:
        client: The connection.
        prefix: Of all keys.
        translated: Awaits a call and gives its errors as the tree's.
    """

    def __init__(self, client: redis.Redis, prefix: str, translated: Callable[[Awaitable[Any]], Awaitable[Any]]) -> None:
        self._redis = client
        self._prefix = prefix
        self._translated = translated
        self._take, self._settle = client.register_script(_TAKE), client.register_script(_SETTLE)
        self._renew, self._add = client.register_script(_RENEW), client.register_script(_ADD)

    async def take_budget(self, wish: Wish) -> Verdict:
        """See ``Budgets``."""
        check_lease(wish.lease_s)
        check_names(tenant=wish.tenant, ticket=wish.ticket)
        check_wish(wish)
        limits = wish.limits
        most = [-1 if each is None else each for each in (limits.requests_per_min, limits.tokens_per_min, limits.num_streams)]
        args: list[str | int] = [wish.ticket, wish.num_tokens, int(wish.lease_s * 1000), *most]
        taking = self._take(keys=[self._account(wish.tenant)], args=args)
        granted, now_ms, num_open, reserved, entries = await self._translated(taking)
        if granted:
            return Verdict()
        window: dict[int, list[int]] = {}
        for name, value in zip(entries[::2], entries[1::2], strict=True):
            kind, _, second = name.decode().partition(":")
            if kind in ("r", "t"):
                window.setdefault(int(second), [0, 0])[kind == "t"] += int(value)
        rows = [(second, requests, tokens) for second, (requests, tokens) in window.items()]
        return judge(wish, rows, num_open, reserved, now_ms / 1000)

    async def settle_budget(self, tenant: str, ticket: str, num_tokens: int) -> None:
        """See ``Budgets``."""
        check_tokens(num_tokens)
        await self._translated(self._settle(keys=[self._account(tenant)], args=[ticket, num_tokens]))

    async def renew_budgets(self, tenant: str, tickets: Sequence[str], lease_s: float) -> None:
        """See ``Budgets``."""
        check_lease(lease_s)
        if len(tickets) > MAX_RENEWED:
            raise InvalidInput(f"{len(tickets)} reservations in one call", "tickets")
        await self._translated(self._renew(keys=[self._account(tenant)], args=[int(lease_s * 1000), *tickets]))

    async def add_use(self, day: str, batch: str, uses: Sequence[Use]) -> None:
        """See ``Budgets``."""
        check_names(batch=batch)
        check_uses(day, uses)
        args: list[str | int] = [KEPT_DAYS * 86_400]
        for use in uses:
            check_names(tenant=use.tenant, model=use.model)
            for name in _FIELDS:
                if number := int(getattr(use, name)):
                    args += [json.dumps([use.tenant, use.model, name]), number]
        await self._translated(self._add(keys=[f"{self._prefix}use:{day}", f"{self._prefix}used:{batch}"], args=args))

    async def used(self, day: str) -> tuple[Use, ...]:
        """See ``Budgets``."""
        rows: dict[tuple[str, str], dict[str, int]] = {}
        for key, value in (await self._translated(self._redis.hgetall(f"{self._prefix}use:{day}"))).items():
            try:
                tenant, model, name = read_json_text(key)
                rows.setdefault((str(tenant), str(model)), dict.fromkeys(_FIELDS, 0))[_FIELDS[_FIELDS.index(name)]] = int(value)
            except (ValueError, TypeError):
                continue  # nobody of ours wrote it
        return tuple(Use(tenant=tenant, model=model, **counts) for (tenant, model), counts in sorted(rows.items()))

    def _account(self, tenant: str) -> str:
        return f"{self._prefix}budget:{tenant}"
