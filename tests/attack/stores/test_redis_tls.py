"""A Redis behind TLS whose certificate, authority and clients' certificates change while a deployment uses it."""

from __future__ import annotations

import asyncio
import datetime
import importlib.util
import ssl
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from antiphon.core.errors import Unavailable
from antiphon.core.identity import Identity, new_key
from antiphon.directory.redis import RedisDirectory
from antiphon.rpc.certificates import TlsFiles


def module(name: str, *path: str) -> Any:
    """A test's module by its file: tests' folders are no packages."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).parents[2].joinpath(*path))
    assert spec is not None
    assert spec.loader is not None
    found = sys.modules.setdefault(name, importlib.util.module_from_spec(spec))
    if found.__spec__ is spec:
        spec.loader.exec_module(found)
    return found


directories = module("directories", "contract", "test_directory.py")
tls = module("tls_at_doors", "contract", "doors", "test_tls.py")
OURS = Identity.parse(new_key())
LONG_S = 30.0


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    made = directories.RedisServer(tmp_path_factory.mktemp("behind"))
    made.start()
    yield made
    made.stop()


class TlsRedis:
    """TLS before a Redis; who connects needs a certificate of the clients' authority."""

    def __init__(self, server: Any, base: Path) -> None:
        self._server, self._base = server, base
        self.files = TlsFiles(certificate=base / "redis.crt", key=base / "redis.key")
        self.client = TlsFiles(certificate=base / "client.crt", key=base / "client.key")
        self.trusted = base / "ca.crt"  # by the clients
        self._open: set[asyncio.StreamWriter] = set()
        self.port = 0
        self._listening: asyncio.Server | None = None

    @property
    def url(self) -> str:
        more = f"ssl_ca_certs={self.trusted}&ssl_certfile={self.client.certificate}&ssl_keyfile={self.client.key}"
        return f"rediss://127.0.0.1:{self.port}/0?{more}"

    async def restart(self, authority: Any, *clients: Any) -> None:
        """Another certificate of ``authority``; clients' are of one of ``clients``. Connections that are open end."""
        await self.stop()
        authority.issue(self.files)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.files.certificate, self.files.key)
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_verify_locations(cadata="".join(each.pem.decode() for each in clients))
        self._listening = await asyncio.start_server(self._serve, "127.0.0.1", self.port, ssl=context)
        self.port = self._listening.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        if self._listening is not None:
            self._listening.close()
        for writer in self._open:
            writer.transport.abort()
        self._open.clear()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        behind, to_redis = await asyncio.open_unix_connection(str(self._server.socket_path))
        self._open |= {writer, to_redis}

        async def pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
            try:
                while data := await source.read(1 << 16):
                    sink.write(data)
            except OSError:
                pass
            finally:
                sink.close()

        await asyncio.gather(pump(reader, to_redis), pump(behind, writer))


@asynccontextmanager
async def using(server: Any, base: Path, authority: Any, clients: Any) -> AsyncIterator[tuple[TlsRedis, RedisDirectory]]:
    behind = TlsRedis(server, base)
    behind.trusted.write_bytes(authority.pem)
    clients.issue(behind.client)
    await behind.restart(authority, clients)
    directory = RedisDirectory(behind.url, identity=OURS)
    try:
        await directory._redis.flushall()
        assert await directory.register(directories.info(), LONG_S)
        yield behind, directory
    finally:
        await directory.close()
        await behind.stop()


async def listed(directory: RedisDirectory) -> list[str]:
    """Within a time that a lease outlives: a connection that broke is made anew."""
    end = datetime.datetime.now() + datetime.timedelta(seconds=20)
    while True:
        try:
            return [record.info.worker_id for record in await directory.workers()]
        except Unavailable:
            if datetime.datetime.now() > end:
                raise
            await asyncio.sleep(0.05)


async def is_reached(directory: RedisDirectory) -> bool:
    """The connection that was open has ended: the first call makes a new one, or can't."""
    try:
        await directory.workers()
    except Unavailable:
        return False
    return True


async def test_certificates_and_authorities_change_under_a_deployment(server: Any, tmp_path: Path) -> None:
    """The overlap as a cert-manager has it: both authorities are trusted, then the new one alone."""
    one, other, clients, newer = (tls.Authority(name) for name in ("one", "other", "clients", "newer"))
    async with using(server, tmp_path, one, clients) as (behind, directory):
        await behind.restart(one, clients)  # another certificate of the same authority
        assert await listed(directory) == ["demo/ffn/0"]
        behind.trusted.write_bytes(one.pem + other.pem)
        await behind.restart(other, clients)
        assert await listed(directory) == ["demo/ffn/0"]
        behind.trusted.write_bytes(other.pem)
        newer.issue(behind.client)  # the clients' own was exchanged, as before it expires
        await behind.restart(other, newer)
        assert await listed(directory) == ["demo/ffn/0"]
        assert await directory.register(directories.info(1), LONG_S)


async def test_the_old_authority_is_refused_after_its_overlap_and_a_strangers_ever(server: Any, tmp_path: Path) -> None:
    one, other, clients, stranger = (tls.Authority(name) for name in ("one", "other", "clients", "one"))
    async with using(server, tmp_path, one, clients) as (behind, directory):
        behind.trusted.write_bytes(other.pem)
        for authority in (one, stranger):  # somebody has the old one's key; somebody has a door of his own
            await behind.restart(authority, clients)
            assert not await is_reached(directory)
        await behind.restart(other, stranger)  # it takes none of our certificates
        assert not await is_reached(directory)
        await behind.restart(other, clients)
        assert await listed(directory) == ["demo/ffn/0"]


async def test_files_that_are_being_written_cost_a_connection_and_no_more(server: Any, tmp_path: Path) -> None:
    one, clients = tls.Authority(), tls.Authority()
    async with using(server, tmp_path, one, clients) as (behind, directory):
        whole = behind.trusted.read_bytes()
        for text in (None, b"", whole[:200], b"\0" * 100):
            if text is None:
                behind.trusted.unlink()
            else:
                behind.trusted.write_bytes(text)
            await behind.restart(one, clients)
            assert not await is_reached(directory)
        behind.trusted.write_bytes(whole)
        assert await listed(directory) == ["demo/ffn/0"]
