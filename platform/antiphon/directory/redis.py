"""The directory in Redis: leases are key expiries, claims are Lua scripts; the only door to redis (control speed).

    antiphon:{directory}:worker:<id>                   hash info, epoch, lease_ms, proof; expires with the lease
    antiphon:{directory}:workers:<deployment>          set of worker ids, pruned when listed
    antiphon:{directory}:deployments                   set of deployment names, pruned when listed
    antiphon:{directory}:index:<deployment>/<pool>:<i> owner; expires with the claim
    antiphon:{directory}:owner:<deployment>/<pool>:<o> index; expires with the claim
    antiphon:{directory}:epoch:<id>                    highest epoch handed out or seen
    antiphon:{directory}:budget:, use:, used:          ``directory.redis_budgets``
    antiphon:{directory}:note:<topic>:<key>            text; expires with its lease
    antiphon:{directory}:notes:<topic>                 sorted set of keys by the end of their lease, pruned when written
    antiphon:{directory}:sizes:<topic>                 hash of those notes' sizes; under "" their sum

The braces hold ``directory``, or ``directory/<namespace>``: two namespaces may share a Redis, and nothing in it. They keep all keys
in one slot of a Redis Cluster. Time is Redis' own, so clocks of hosts do not matter.
A record's proof is made with the deployment's key: whoever else writes to the same Redis adds no worker to it, and supersedes none.
What is there and can't be right (another type, no number, no end) counts as not there: what was written once must not last.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Mapping
from typing import Any, TypeVar, cast

import redis.asyncio as redis
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError
from redis.exceptions import TimeoutError as RedisTimeoutError

from antiphon.core.directory import (
    MAX_EPOCH,
    MAX_EPOCH_STEP,
    MAX_LEASE_S,
    MAX_NOTE_BYTES,
    MAX_NOTES,
    MAX_TOPIC_BYTES,
    WorkerRecord,
    check_lease,
    check_names,
)
from antiphon.core.errors import AntiphonError, InvalidInput, Unavailable
from antiphon.core.identity import Identity, own_identity
from antiphon.core.ids import Epoch, WorkerId
from antiphon.core.worker_info import WorkerInfo
from antiphon.directory.redis_budgets import RedisBudgets

# Shared beginning. Leaves: whole(text), the number or nil; clear(key, type), a key of another type is none; epoch_at(key), or nil.
_KNOWN = f"""
local function whole(text)
  local number = tonumber(text or '')
  if number and number >= 0 and number <= {MAX_EPOCH} then return number end
end
local function clear(key, kind)
  local found = redis.call('TYPE', key).ok
  if found ~= kind and found ~= 'none' then redis.call('DEL', key) end
end
local function epoch_at(key)
  clear(key, 'string')
  return whole(redis.call('GET', key))
end
"""

# KEYS worker, epoch, workers of the deployment, deployments; ARGV info, lease_ms, epoch, worker id, deployment, epoch step, proof.
# Answers nothing; where the record that is there has a higher epoch, its info and proof.
_REGISTER = (
    _KNOWN
    + """
local given, highest = tonumber(ARGV[3]), epoch_at(KEYS[2])
local known = math.max(highest or 0, tonumber(redis.call('TIME')[1]))
if given > known + tonumber(ARGV[6]) then return redis.error_reply('EPOCH out of range') end
clear(KEYS[1], 'hash')
local held = redis.call('HMGET', KEYS[1], 'epoch', 'info', 'proof')
local other = tonumber(held[1] or '')
if other and other > given then return {held[2] or '', held[3] or ''} end
redis.call('HSET', KEYS[1], 'info', ARGV[1], 'epoch', ARGV[3], 'lease_ms', ARGV[2], 'proof', ARGV[7])
redis.call('PEXPIRE', KEYS[1], ARGV[2])
if not highest or highest < given then redis.call('SET', KEYS[2], ARGV[3]) end
clear(KEYS[3], 'set')
clear(KEYS[4], 'set')
redis.call('SADD', KEYS[3], ARGV[4])
redis.call('SADD', KEYS[4], ARGV[5])
return {}
"""
)

# KEYS worker; ARGV info, proof: a record that nobody of ours wrote, unless it is another one by now.
_DROP = """
local held = redis.call('HMGET', KEYS[1], 'info', 'proof')
if (held[1] or '') == ARGV[1] and (held[2] or '') == ARGV[2] then redis.call('DEL', KEYS[1]) end
"""

# KEYS worker; ARGV epoch. The set of ids is pruned when listed.
_REMOVE = """
if redis.call('HGET', KEYS[1], 'epoch') ~= ARGV[1] then return 0 end
return redis.call('DEL', KEYS[1])
"""

# KEYS deployments; ARGV prefix, deployment or nothing. Answers id, info, lease_ms, remaining_ms, proof for each worker.
_WORKERS = (
    _KNOWN
    + """
clear(KEYS[1], 'set')
local names = ARGV[2] and {ARGV[2]} or redis.call('SMEMBERS', KEYS[1])
local found = {}
for _, name in ipairs(names) do
  local ids = ARGV[1] .. 'workers:' .. name
  clear(ids, 'set')
  for _, id in ipairs(redis.call('SMEMBERS', ids)) do
    local key = ARGV[1] .. 'worker:' .. id
    clear(key, 'hash')
    local record = redis.call('HMGET', key, 'info', 'lease_ms', 'proof')
    local left = redis.call('PTTL', key)
    if not record[1] then
      redis.call('SREM', ids, id)
    elseif whole(record[2]) and left >= 0 then
      found[#found + 1] = {id, record[1], whole(record[2]), left, record[3] or ''}
    end
  end
  if redis.call('SCARD', ids) == 0 then redis.call('SREM', KEYS[1], name) end
end
return found
"""
)

# KEYS the owner's; ARGV prefix of the pool's index keys, owner, lease_ms, preferred or nothing
_CLAIM = """
local index = redis.call('GET', KEYS[1])
if not index or redis.call('GET', ARGV[1] .. index) ~= ARGV[2] then
  index = ARGV[4]
  if not index or redis.call('EXISTS', ARGV[1] .. index) == 1 then
    index = 0
    while redis.call('EXISTS', ARGV[1] .. index) == 1 do index = index + 1 end
  end
end
redis.call('SET', ARGV[1] .. index, ARGV[2], 'PX', ARGV[3])
redis.call('SET', KEYS[1], index, 'PX', ARGV[3])
return tonumber(index)
"""

# KEYS the owner's; ARGV prefix of the pool's index keys, owner
_RELEASE = """
local index = redis.call('GET', KEYS[1])
if index and redis.call('GET', ARGV[1] .. index) == ARGV[2] then redis.call('DEL', ARGV[1] .. index) end
return redis.call('DEL', KEYS[1])
"""

# KEYS the note, its topic, the topic's sizes; ARGV text, lease_ms, key, prefix of the topic's notes, most notes, most bytes
_PUT_NOTE = """
local time = redis.call('TIME')
local now = tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)
local function drop(key)
  redis.call('HINCRBY', KEYS[3], '', 0 - tonumber(redis.call('HGET', KEYS[3], key) or 0))
  redis.call('HDEL', KEYS[3], key)
  redis.call('ZREM', KEYS[2], key)
  redis.call('DEL', ARGV[4] .. key)
end
for _, key in ipairs(redis.call('ZRANGEBYSCORE', KEYS[2], '-inf', now)) do drop(key) end
drop(ARGV[3])
local bytes = redis.call('HINCRBY', KEYS[3], '', #ARGV[1])
local oldest = redis.call('ZRANGE', KEYS[2], 0, 0)[1]
while oldest and (bytes > tonumber(ARGV[6]) or redis.call('ZCARD', KEYS[2]) >= tonumber(ARGV[5])) do
  drop(oldest)
  bytes = tonumber(redis.call('HGET', KEYS[3], ''))
  oldest = redis.call('ZRANGE', KEYS[2], 0, 0)[1]
end
redis.call('HSET', KEYS[3], ARGV[3], #ARGV[1])
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
redis.call('ZADD', KEYS[2], now + tonumber(ARGV[2]), ARGV[3])
local last = redis.call('ZREVRANGE', KEYS[2], 0, 0, 'WITHSCORES')[2]
redis.call('PEXPIREAT', KEYS[2], last)
redis.call('PEXPIREAT', KEYS[3], last)
"""

# KEYS the topic; ARGV prefix of its notes. Answers key, text for each.
_NOTES = """
local found = {}
for _, key in ipairs(redis.call('ZRANGE', KEYS[1], 0, -1)) do
  local text = redis.call('GET', ARGV[1] .. key)
  if text then found[#found + 1] = {key, text} end
end
return found
"""

# KEYS epoch; ARGV after, epoch step. An unknown worker starts at Redis' time in seconds: a store that was emptied must not go back.
_EPOCH = (
    _KNOWN
    + """
local now = tonumber(redis.call('TIME')[1])
local epoch = epoch_at(KEYS[1]) or now
if tonumber(ARGV[1]) > math.max(epoch, now) + tonumber(ARGV[2]) then return redis.error_reply('EPOCH out of range') end
epoch = math.max(epoch, tonumber(ARGV[1])) + 1
redis.call('SET', KEYS[1], string.format('%.0f', epoch))
return epoch
"""
)

T = TypeVar("T")

logger = logging.getLogger(__name__)


class _TlsConnection(redis.SSLConnection):
    """One that reads its certificates when it connects: redis-py's own keeps, for as long as it is used again, those that it read
    first, also when they have expired or their authority has gone.
    """

    def _connection_arguments(self) -> Mapping[str, Any]:
        self.ssl_context.context = None
        arguments: Mapping[str, Any] = super()._connection_arguments()
        return arguments


class RedisDirectory:
    """A client of one Redis; belongs to one event loop. Each call takes ``timeout_s`` seconds at most."""

    def __init__(self, url: str, *, timeout_s: float = 5.0, identity: Identity | None = None, namespace: str = "") -> None:
        """``namespace``: what is written in another one is not seen; "" is one, too."""
        self._fixed = identity
        self._prefix = f"antiphon:{{directory{f'/{namespace}' if namespace else ''}}}:"
        try:
            self._redis: redis.Redis = redis.Redis.from_url(
                url, socket_timeout=timeout_s, socket_connect_timeout=timeout_s, health_check_interval=30
            )
        except ValueError as error:
            raise InvalidInput(f"not a Redis URL: {error}", "directory.redisUrl") from error
        if issubclass(self._redis.connection_pool.connection_class, redis.SSLConnection):
            self._redis.connection_pool.connection_class = _TlsConnection
        self.budgets = RedisBudgets(self._redis, self._prefix, _translated)
        self._register = self._redis.register_script(_REGISTER)
        self._drop = self._redis.register_script(_DROP)
        self._remove = self._redis.register_script(_REMOVE)
        self._workers = self._redis.register_script(_WORKERS)
        self._claim = self._redis.register_script(_CLAIM)
        self._release = self._redis.register_script(_RELEASE)
        self._epoch = self._redis.register_script(_EPOCH)
        self._put_note = self._redis.register_script(_PUT_NOTE)
        self._notes = self._redis.register_script(_NOTES)

    @property
    def _identity(self) -> Identity:
        return own_identity() if self._fixed is None else self._fixed

    def _owner_key(self, deployment: str, pool: str, owner: str) -> str:
        return f"{self._prefix}owner:{deployment}/{pool}:{owner}"

    async def register(self, info: WorkerInfo, lease_s: float) -> bool:
        """See ``Directory``."""
        check_lease(lease_s)
        check_names(worker_id=info.worker_id, deployment=info.deployment)
        keys = [
            f"{self._prefix}worker:{info.worker_id}",
            f"{self._prefix}epoch:{info.worker_id}",
            f"{self._prefix}workers:{info.deployment}",
            f"{self._prefix}deployments",
        ]
        args: list[str | int] = [info.to_json(), _milliseconds(lease_s), info.epoch, info.worker_id, info.deployment]
        args += [MAX_EPOCH_STEP, self._identity.prove("record", info.to_json().encode()).hex()]
        while held := await _translated(self._register(keys=keys, args=args)):
            text, proof = held
            if self._supersedes(text, proof, info.epoch):
                return False
            logger.warning("a record of %s that no part of this deployment wrote is removed", info.worker_id)
            await _translated(self._drop(keys=keys[:1], args=held))
        return True

    async def remove(self, worker_id: WorkerId, epoch: Epoch) -> bool:
        """See ``Directory``."""
        return bool(await _translated(self._remove(keys=[f"{self._prefix}worker:{worker_id}"], args=[epoch])))

    async def workers(self, deployment: str | None = None) -> tuple[WorkerRecord, ...]:
        """See ``Directory``."""
        args = [self._prefix] if deployment is None else [self._prefix, deployment]
        rows = await _translated(self._workers(keys=[f"{self._prefix}deployments"], args=args))
        records = []
        for worker_id, text, lease, left, proof in rows:
            if not self._is_ours(text, proof) or not left <= lease <= MAX_LEASE_S * 1000:
                continue  # of another deployment that shares this Redis, or of nobody's
            try:
                info = WorkerInfo.from_json(text)
            except InvalidInput as error:  # whoever wrote it: it must not hide the others
                logger.warning("a record is left out: %s", error)
                continue
            if info.worker_id.encode() != worker_id:
                continue  # somebody copied it
            records.append(WorkerRecord(info=info, age_s=max(0.0, (lease - left) / 1000), lease_s=lease / 1000))
        return tuple(sorted(records, key=lambda record: record.info.worker_id))

    async def claim_index(self, deployment: str, pool: str, owner: str, lease_s: float, preferred: int | None = None) -> int:
        """See ``Directory``."""
        check_lease(lease_s)
        check_names(deployment=deployment, pool=pool, owner=owner)
        args: list[str | int] = [f"{self._prefix}index:{deployment}/{pool}:", owner, _milliseconds(lease_s)]
        if preferred is not None:
            args.append(preferred)
        return int(await _translated(self._claim(keys=[self._owner_key(deployment, pool, owner)], args=args)))

    async def release_index(self, deployment: str, pool: str, owner: str) -> None:
        """See ``Directory``."""
        args = [f"{self._prefix}index:{deployment}/{pool}:", owner]
        await _translated(self._release(keys=[self._owner_key(deployment, pool, owner)], args=args))

    async def next_epoch(self, worker_id: WorkerId, after: Epoch = Epoch(0)) -> Epoch:
        """See ``Directory``."""
        check_names(worker_id=worker_id)
        return Epoch(int(await _translated(self._epoch(keys=[f"{self._prefix}epoch:{worker_id}"], args=[after, MAX_EPOCH_STEP]))))

    async def put_note(self, topic: str, key: str, text: str, lease_s: float) -> None:
        """See ``Notes``."""
        check_lease(lease_s)
        check_names(topic=topic, key=key)
        if len(text) > MAX_NOTE_BYTES:
            raise InvalidInput(f"a note of {len(text)} characters, at most {MAX_NOTE_BYTES} are kept", "text")
        notes = f"{self._prefix}note:{topic}:"
        keys = [f"{notes}{key}", f"{self._prefix}notes:{topic}", f"{self._prefix}sizes:{topic}"]
        args: list[str | int] = [text, _milliseconds(lease_s), key, notes, MAX_NOTES, MAX_TOPIC_BYTES]
        await _translated(self._put_note(keys=keys, args=args))

    async def note(self, topic: str, key: str) -> str | None:
        """See ``Notes``."""
        text = await _translated(self._redis.get(f"{self._prefix}note:{topic}:{key}"))
        return None if text is None else _text(text)

    async def notes(self, topic: str) -> Mapping[str, str]:
        """See ``Notes``."""
        rows = await _translated(self._notes(keys=[f"{self._prefix}notes:{topic}"], args=[f"{self._prefix}note:{topic}:"]))
        found = ((_text(key), _text(text)) for key, text in sorted(rows))
        return {key: text for key, text in found if key is not None and text is not None}

    async def close(self) -> None:
        """See ``Directory``."""
        await self._redis.aclose()

    def _is_ours(self, text: bytes, proof: bytes) -> bool:
        return not self._identity.given or self._identity.is_proof(_unhex(proof), "record", text)

    def _supersedes(self, text: bytes, proof: bytes, epoch: Epoch) -> bool:
        """Whether a part of this deployment wrote this record, of a higher epoch."""
        try:
            return self._is_ours(text, proof) and WorkerInfo.from_json(text).epoch > epoch
        except InvalidInput:
            return False


def _unhex(text: bytes) -> bytes:
    try:
        return bytes.fromhex(text.decode())
    except ValueError:
        return b""


def _text(raw: bytes) -> str | None:
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return None  # nobody of ours wrote it


def _milliseconds(seconds: float) -> int:
    return max(1, round(seconds * 1000))


async def _translated(call: Awaitable[T]) -> Any:
    task = asyncio.current_task()
    num_cancelled = 0 if task is None else task.cancelling()
    try:
        return cast(Any, await call)
    except (RedisConnectionError, RedisTimeoutError, OSError) as error:
        raise Unavailable(f"the directory's Redis can't be reached: {error}") from error
    except RedisError as error:
        raise _unexpected(error) from error
    finally:
        if task is not None and task.cancelling() > num_cancelled:
            raise asyncio.CancelledError  # Redis' client may have taken it for a timeout of its own


def _unexpected(error: RedisError) -> AntiphonError:
    text = str(error)
    if text.startswith("EPOCH"):
        return InvalidInput(f"the directory's Redis: {text}", "epoch")
    # Memory or a disk that is full, a user's rights that changed, a replica that was promoted: each may end, and no worker with it.
    return Unavailable(f"the directory's Redis can't serve now: {text}")
