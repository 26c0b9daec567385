"""A real API server for tests: etcd and kube-apiserver from a directory, as setup-envtest installs them (control speed).

    made --start--> etcd answers --> kube-apiserver is ready --> usable --close--> both stopped by pid, their files gone

Everything listens on loopback, on free ports, with certificates made for this one start. Must not know: the operator.
"""

from __future__ import annotations

import datetime
import ipaddress
import json
import os
import secrets
import shutil
import socket
import ssl
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from antiphon.core.errors import DeadlineExceeded, Unavailable

ASSETS_VARIABLE = "KUBEBUILDER_ASSETS"
ADMIN = "admin"
_BINARIES = ("etcd", "kube-apiserver")
_POLL_S = 0.1
_STOP_DEADLINE_S = 5.0
_TAKEN = "address already in use"
_MAX_STARTS = 3  # a free port may be taken by somebody else before it is used
_LAST_WORDS_BYTES = 4000


def find_assets(environment: Mapping[str, str] = os.environ) -> Path | None:
    """The directory that KUBEBUILDER_ASSETS names when it holds both programs, else None."""
    named = environment.get(ASSETS_VARIABLE)
    if not named:
        return None
    directory = Path(named)
    return directory if all(os.access(directory / name, os.X_OK) for name in _BINARIES) else None


class ApiServer:
    """etcd and kube-apiserver, running between ``start`` and ``close``. Use as a context manager.

    Args:
        assets: directory with ``etcd`` and ``kube-apiserver``.
        users: names that may log in besides ``admin``, without any right until one is given.
        start_timeout_s: deadline of each program's start.
    """

    def __init__(self, assets: Path, *, users: Sequence[str] = (), start_timeout_s: float = 90.0) -> None:
        self._assets = assets
        self._start_timeout_s = start_timeout_s
        self._tokens = {user: secrets.token_hex(16) for user in (ADMIN, *users)}
        self._directory = Path()
        self._processes: list[subprocess.Popen[bytes]] = []
        self.url = ""

    def __enter__(self) -> ApiServer:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.close()

    def start(self) -> ApiServer:
        """Start both programs and wait until they serve.

        Raises:
            Unavailable: one of them ended; its last words are in the message.
            DeadlineExceeded: one of them was not ready in time.
        """
        for attempt in range(1, _MAX_STARTS + 1):
            try:
                self._start_once()
            except Unavailable as error:
                self.close()
                if attempt == _MAX_STARTS or _TAKEN not in str(error):
                    raise
            except BaseException:
                self.close()
                raise
            else:
                return self
        raise AssertionError("the last attempt returns or raises")

    def close(self) -> None:
        """Stop both, the API server first, and remove their files; again does nothing."""
        while self._processes:
            process = self._processes.pop()
            process.terminate()
            try:
                process.wait(_STOP_DEADLINE_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(_STOP_DEADLINE_S)
        if self._directory != Path():
            shutil.rmtree(self._directory, ignore_errors=True)
            self._directory = Path()

    @property
    def pids(self) -> tuple[int, ...]:
        """Process ids of etcd and kube-apiserver."""
        return tuple(process.pid for process in self._processes)

    def kubeconfig(self, user: str = ADMIN, namespace: str = "default") -> str:
        """A kubeconfig as YAML with which ``user`` logs in."""
        cluster = {"server": self.url, "certificate-authority": str(self._directory / "ca.crt")}
        value = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "test",
            "contexts": [{"name": "test", "context": {"cluster": "test", "user": user, "namespace": namespace}}],
            "clusters": [{"name": "test", "cluster": cluster}],
            "users": [{"name": user, "user": {"token": self._tokens[user]}}],
        }
        return str(yaml.safe_dump(value))

    def install(self, definitions: Iterable[Mapping[str, Any]]) -> None:
        """Apply CustomResourceDefinitions and wait until their kinds are served.

        Raises:
            Unavailable: the API server refuses one.
            DeadlineExceeded: one was not established in time.
        """
        names = []
        base = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions"
        for definition in definitions:
            name = definition["metadata"]["name"]
            names.append(name)
            self.request("PATCH", f"{base}/{name}?fieldManager=tests&force=true", definition)
        for name in names:
            self._until(lambda name=name: self._established(f"{base}/{name}"), f"the kind {name}")  # type: ignore[misc]

    def request(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """One request as the administrator; a PATCH is a server-side apply.

        Raises:
            Unavailable: the answer is no success.
        """
        content = "application/apply-patch+yaml" if method == "PATCH" else "application/json"
        request = urllib.request.Request(  # noqa: S310 - our own address
            self.url + path,
            method=method,
            data=None if body is None else json.dumps(body).encode(),
            headers={"Authorization": f"Bearer {self._tokens[ADMIN]}", "Content-Type": content},
        )
        try:
            with urllib.request.urlopen(request, timeout=10.0, context=self._trust()) as response:  # noqa: S310
                text = response.read()
        except urllib.error.HTTPError as error:
            raise Unavailable(f"{method} {path}: {error.code} {error.read().decode(errors='replace')}") from error
        except OSError as error:
            raise Unavailable(f"{method} {path}: {error}") from error
        try:
            value = json.loads(text)
        except ValueError:
            return {}  # /readyz says "ok"
        return dict(value)

    def _start_once(self) -> None:
        self._directory = Path(tempfile.mkdtemp(prefix="antiphon-api-"))
        self._directory.chmod(0o700)
        _write_certificates(self._directory)
        tokens = "".join(
            f'{token},{user},{user},"{"system:masters" if user == ADMIN else ""}"\n' for user, token in self._tokens.items()
        )
        (self._directory / "tokens.csv").write_text(tokens)
        etcd, peers, secure = (_free_port() for _ in range(3))
        etcd_url = f"http://127.0.0.1:{etcd}"
        self._run("etcd", etcd_arguments(self._directory, etcd, peers), lambda: _answers(f"{etcd_url}/health"))
        self.url = f"https://127.0.0.1:{secure}"
        arguments = api_server_arguments(self._directory, etcd_url, secure)
        self._run("kube-apiserver", arguments, self._is_ready)

    def _run(self, name: str, arguments: Sequence[str], ready: Callable[[], bool]) -> None:
        log = self._directory / f"{name}.log"
        with log.open("wb") as output:
            command = [str(self._assets / name), *arguments]
            process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, cwd=self._directory)
        self._processes.append(process)

        def up() -> bool:
            if process.poll() is not None:
                words = log.read_bytes()[-_LAST_WORDS_BYTES:].decode(errors="replace")
                raise Unavailable(f"{name} ended with {process.returncode}: {words}")
            return ready()

        self._until(up, name)

    def _until(self, holds: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + self._start_timeout_s
        while not holds():
            if time.monotonic() > deadline:
                raise DeadlineExceeded(f"{what} was not ready within {self._start_timeout_s:.0f} s")
            time.sleep(_POLL_S)

    def _is_ready(self) -> bool:
        try:
            self.request("GET", "/readyz")
            self.request("GET", "/api/v1/namespaces/default")
        except Unavailable:
            return False
        return True

    def _established(self, path: str) -> bool:
        conditions = self.request("GET", path).get("status", {}).get("conditions")  # null at first
        return conditions is not None and any(c["type"] == "Established" and c["status"] == "True" for c in conditions)

    def _trust(self) -> ssl.SSLContext:
        return ssl.create_default_context(cafile=str(self._directory / "ca.crt"))


def etcd_arguments(directory: Path, client_port: int, peer_port: int) -> list[str]:
    """Arguments of an etcd of one member on loopback."""
    clients, peers = f"http://127.0.0.1:{client_port}", f"http://127.0.0.1:{peer_port}"
    return [
        f"--data-dir={directory / 'etcd'}",
        f"--listen-client-urls={clients}",
        f"--advertise-client-urls={clients}",
        f"--listen-peer-urls={peers}",
        f"--initial-advertise-peer-urls={peers}",
        f"--initial-cluster=default={peers}",
    ]


def api_server_arguments(directory: Path, etcd_url: str, port: int) -> list[str]:
    """Arguments of a kube-apiserver without controllers: rights are checked, service accounts are not mounted."""
    return [
        f"--etcd-servers={etcd_url}",
        "--bind-address=127.0.0.1",
        f"--secure-port={port}",
        f"--tls-cert-file={directory / 'server.crt'}",
        f"--tls-private-key-file={directory / 'server.key'}",
        f"--cert-dir={directory}",
        f"--token-auth-file={directory / 'tokens.csv'}",
        "--authorization-mode=RBAC",
        "--disable-admission-plugins=ServiceAccount",
        "--allow-privileged=true",
        "--endpoint-reconciler-type=none",
        "--service-cluster-ip-range=10.0.0.0/24",
        f"--service-account-issuer=https://127.0.0.1:{port}/",
        f"--service-account-key-file={directory / 'server.key'}",
        f"--service-account-signing-key-file={directory / 'server.key'}",
    ]


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2.0) as response:  # noqa: S310 - our own address
            return bool(response.status == 200)
    except OSError:
        return False


def _write_certificates(directory: Path) -> None:
    """An authority for this one start, and a certificate of it for 127.0.0.1."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

    now = datetime.datetime.now(datetime.UTC)
    authority_key, server_key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    authority = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "antiphon tests")])

    def builder(subject: x509.Name, key: ec.EllipticCurvePrivateKey) -> x509.CertificateBuilder:
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(authority)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(minutes=5))
            .not_valid_after(now + datetime.timedelta(days=1))
        )

    usage = x509.KeyUsage(
        digital_signature=True, key_cert_sign=True, crl_sign=True, content_commitment=False, key_encipherment=False,
        data_encipherment=False, key_agreement=False, encipher_only=False, decipher_only=False,
    )  # fmt: skip
    identifier = x509.SubjectKeyIdentifier.from_public_key(authority_key.public_key())
    root = (
        builder(authority, authority_key)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(identifier, critical=False)
        .sign(authority_key, hashes.SHA256())
    )
    names = [x509.IPAddress(ipaddress.IPv4Address("127.0.0.1")), x509.DNSName("localhost")]
    server = (
        builder(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "kube-apiserver")]), server_key)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identifier), critical=False)
        .sign(authority_key, hashes.SHA256())
    )
    (directory / "ca.crt").write_bytes(root.public_bytes(serialization.Encoding.PEM))
    (directory / "server.crt").write_bytes(server.public_bytes(serialization.Encoding.PEM))
    key = server_key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.TraditionalOpenSSL, serialization.NoEncryption()
    )
    (directory / "server.key").write_bytes(key)
