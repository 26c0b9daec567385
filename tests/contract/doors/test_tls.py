"""TLS at both doors: who is trusted, and certificates that change while streams run."""

from __future__ import annotations

import asyncio
import datetime
import importlib.util
import ipaddress
import logging
import ssl
import sys
from pathlib import Path

import grpc
import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from antiphon.client import AsyncClient, RetryPolicy, Tls
from antiphon.core.errors import Unavailable
from antiphon.rpc.certificates import DoorCertificate, TlsFiles, own_door_context
from antiphon.rpc.credentials import name_in

_spec = importlib.util.spec_from_file_location("doors_fake_engine", Path(__file__).with_name("fake_engine.py"))
assert _spec is not None
assert _spec.loader is not None
fake = sys.modules.setdefault(_spec.name, importlib.util.module_from_spec(_spec))
if not hasattr(fake, "world"):
    _spec.loader.exec_module(fake)


class Authority:
    """A certificate authority of a test's own."""

    def __init__(self, name: str = "test authority") -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        self.pem = self._sign(self._name, self._key, authority=True)

    def issue(self, files: TlsFiles) -> None:
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "door")])
        files.key.write_bytes(
            key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        )
        files.certificate.write_bytes(self._sign(subject, key, authority=False))

    def _sign(self, subject: x509.Name, key: ec.EllipticCurvePrivateKey, *, authority: bool) -> bytes:
        now = datetime.datetime.now(datetime.UTC)
        names = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(hours=1))
            .not_valid_after(now + datetime.timedelta(hours=1))
            .add_extension(x509.BasicConstraints(ca=authority, path_length=None), critical=True)
        )
        if not authority:
            builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        return builder.sign(self._key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


@pytest.fixture
def files(tmp_path: Path) -> TlsFiles:
    return TlsFiles(certificate=tmp_path / "tls.crt", key=tmp_path / "tls.key")


def trusting(authority: Authority) -> ssl.SSLContext:
    return ssl.create_default_context(cadata=authority.pem.decode())


async def test_both_doors_take_up_a_new_certificate_and_open_streams_go_on(tmp_path: Path, files: TlsFiles) -> None:
    old, new = Authority(), Authority()
    old.issue(files)
    async with fake.world(tmp_path, gateway={"tls": files}, step_s=0.02) as world:
        url, address = f"https://127.0.0.1:{world.ports.http_port}", world.grpc_address
        asked = {"model": "tiny", "prompt": "what is it?", "max_tokens": 150, "stream": True, "ignore_eos": True, "seed": 1}
        no_retry = RetryPolicy(max_attempts=1)
        async with (
            httpx.AsyncClient(base_url=url, verify=trusting(old)) as http,
            AsyncClient(address, tls=Tls(root_certificates=old.pem), retry=no_retry) as client,
            http.stream("POST", "/v1/completions", json=asked) as answer,
            client.stream("tiny", prompt="what is it?", max_tokens=150, ignore_eos=True, seed=1) as stream,
        ):
            lines, chunks = aiter(answer.aiter_lines()), aiter(stream)
            begun = [await anext(lines), (await anext(chunks)).text]
            new.issue(files)
            async with asyncio.timeout(10), httpx.AsyncClient(base_url=url, verify=trusting(new)) as newcomer:
                while True:
                    try:
                        assert (await newcomer.get("/health")).status_code == 200
                        break
                    except httpx.ConnectError:
                        await asyncio.sleep(0.05)
            async with AsyncClient(address, tls=Tls(root_certificates=new.pem), retry=no_retry) as newcomer_client:
                assert [model.id for model in await newcomer_client.list_models()] == ["tiny"]
            with pytest.raises(httpx.ConnectError):  # trusts only the authority of the old one
                async with httpx.AsyncClient(verify=trusting(old)) as late:
                    await late.get(f"{url}/health")
            rest = [line async for line in lines]
            text = begun[1] + "".join([chunk.text async for chunk in chunks])
        assert rest[-2] == "data: [DONE]"
        alone = {**asked, "stream": False}
        async with httpx.AsyncClient(base_url=url, verify=trusting(new)) as http:
            assert (await http.post("/v1/completions", json=alone)).json()["choices"][0]["text"] == text


async def test_nobody_is_answered_in_plain_text_or_with_a_certificate_that_is_not_trusted(tmp_path: Path, files: TlsFiles) -> None:
    authority = Authority()
    authority.issue(files)
    async with fake.world(tmp_path, gateway={"tls": files}) as world:
        for client in (httpx.AsyncClient(base_url=world.url), httpx.AsyncClient(base_url=world.url.replace("http:", "https:"))):
            async with client:
                with pytest.raises(httpx.TransportError):
                    await client.get("/health")
        for tls in (None, Tls(root_certificates=Authority().pem)):
            async with AsyncClient(world.grpc_address, tls=tls, timeout_s=5, retry=RetryPolicy(max_attempts=1)) as stranger:
                with pytest.raises(Unavailable):
                    await stranger.list_models()
        # Its own processes trust nothing but this certificate.
        async with httpx.AsyncClient(verify=own_door_context(files.certificate)) as own:
            assert (await own.get(f"https://127.0.0.1:{world.ports.http_port}/health")).status_code == 200
        pem = files.certificate.read_bytes()
        async with AsyncClient(world.grpc_address, tls=Tls(root_certificates=pem, server_name=name_in(pem))) as own_client:
            assert await own_client.list_models()


def test_files_that_do_not_belong_together_change_nothing(files: TlsFiles, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    now_s = 0.0
    authority = Authority()
    authority.issue(files)
    door = DoorCertificate(files, clock=lambda: now_s)
    first_key = files.key.read_bytes()
    authority.issue(files)
    second_key = files.key.read_bytes()
    files.key.write_bytes(first_key)  # half of a change
    for _ in range(3):
        now_s += 1
        assert door.look() == 1
    assert len([r for r in caplog.records if "stays as it is" in r.message]) == 1
    files.key.write_bytes(second_key)
    assert door.look() == 1  # not looked at for a second
    now_s += 1
    assert door.look() == 2
    files.certificate.unlink()
    now_s += 1
    assert door.look() == 2
    assert isinstance(door.server_credentials(), grpc.ServerCredentials)


def test_a_door_does_not_open_without_its_certificate(files: TlsFiles) -> None:
    with pytest.raises(Unavailable, match=r"spec\.endpoint\.tls"):
        DoorCertificate(files)
