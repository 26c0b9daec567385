"""Certificates of the connections between a deployment's parts, made from its key; the only door to cryptography (control speed).

Every process with the key can work out the same authority (a P-256 key derived from the deployment's), signs itself a certificate
with it when it first needs one, and takes only peers whose certificate that authority signed, at both ends. So there is nothing to
hand out but the key, and who has none gets no further than the handshake. Certificates live as long as their process has that key.
Must not know: which services travel on a connection.
"""

from __future__ import annotations

import datetime
import functools
import hmac
import resource
from typing import Final

import grpc

from antiphon.core.identity import Identity, own_identity

PART_NAME = "part.antiphon.internal"  # in every certificate: parts are known by the key, not by an address
_ORDER = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551  # of P-256 (FIPS 186-4, D.1.2.3)
_VALID = datetime.timedelta(days=3650)


def server_credentials(identity: Identity | None = None) -> grpc.ServerCredentials:
    """Take calls from parts of the same deployment only; where keys change, each handshake takes those that hold then."""
    given = own_identity() if identity is None else identity

    def newer() -> grpc.ServerCertificateConfiguration | None:  # None: the one that was given last still holds
        nonlocal given
        now = own_identity() if identity is None else identity
        if now is given:
            return None
        given = now
        return _configuration(now)

    return grpc.dynamic_ssl_server_credentials(
        _configuration(given),
        newer,  # type: ignore[arg-type]  # the stubs miss that it may return None
        require_client_authentication=True,
    )


def _configuration(identity: Identity) -> grpc.ServerCertificateConfiguration:
    roots, key, chain = _material(identity)
    return grpc.ssl_server_certificate_configuration([(key, chain)], root_certificates=roots)


def channel_credentials(identity: Identity | None = None) -> grpc.ChannelCredentials:
    """Call parts of the same deployment only; with ``TARGET_OPTIONS`` among the channel's options. They stay what they are when
    keys change: a channel that is kept for long is made anew then (``PartChannel``).
    """
    roots, key, chain = _material(own_identity() if identity is None else identity)
    return grpc.ssl_channel_credentials(roots, key, chain)


TARGET_OPTIONS: list[tuple[str, str]] = [("grpc.ssl_target_name_override", PART_NAME)]

_HANDSHAKE_MS: Final = 5_000  # for whoever connects to prove itself, and to speak HTTP/2 at all
_MAX_CONNECTIONS: Final = 2048
_FILES_FOR_OTHERS: Final = 96  # descriptors kept for what a process has besides its doors' connections


def files_for(share: float, most: int) -> int:
    """How many connections a door may hold: its share of the open files that this process may have, ``most`` at most."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return most
    return max(8, min(most, int((soft - _FILES_FOR_OTHERS) * share)))


def max_connections() -> int:
    """That a gRPC door holds: a quarter of the process' files, so that neither files nor ports of its own run out."""
    return files_for(0.25, _MAX_CONNECTIONS)


def knocking_options() -> list[tuple[str, int]]:
    """What a gRPC door bears of those who have not proven themselves: a silent connection is closed soon, and further ones than it
    may hold are closed at once; ``rpc.doors.crowd`` sees to it that others go before.
    """
    return [
        ("grpc.server_handshake_timeout_ms", _HANDSHAKE_MS),
        ("grpc.max_allowed_incoming_connections", max_connections()),
    ]


def name_in(certificate: bytes) -> str | None:
    """A DNS name or address that a PEM certificate is for; None = it names none."""
    from cryptography import x509

    try:
        names = x509.load_pem_x509_certificate(certificate).extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (ValueError, x509.ExtensionNotFound):
        return None
    found = [*names.get_values_for_type(x509.DNSName), *map(str, names.get_values_for_type(x509.IPAddress))]
    return next(iter(found), None)


@functools.lru_cache(maxsize=16)
def _material(identity: Identity) -> tuple[bytes, bytes, bytes]:
    """Authorities' certificates, this process' private key and its certificate, all PEM."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

    now = datetime.datetime.now(datetime.UTC)
    start, end = now - datetime.timedelta(days=1), now + _VALID

    def authority(index: int) -> tuple[ec.EllipticCurvePrivateKey, x509.Name]:
        seed = b"".join(hmac.digest(identity.derive("authority", index), bytes([part]), "sha512") for part in range(2))
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"antiphon deployment {identity.key_id(index).hex()}")])
        return ec.derive_private_key(int.from_bytes(seed) % (_ORDER - 1) + 1, ec.SECP256R1()), name

    def certificate(
        subject: x509.Name,
        public: ec.EllipticCurvePublicKey,
        signer: ec.EllipticCurvePrivateKey,
        issuer: x509.Name,
        *,
        is_authority: bool,
    ) -> bytes:
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(issuer)
            .public_key(public)
            .serial_number(x509.random_serial_number())
            .not_valid_before(start)
            .not_valid_after(end)
            .add_extension(x509.BasicConstraints(ca=is_authority, path_length=0 if is_authority else None), critical=True)
        )
        if not is_authority:
            both = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
            builder = builder.add_extension(x509.SubjectAlternativeName([x509.DNSName(PART_NAME)]), critical=False)
            builder = builder.add_extension(x509.ExtendedKeyUsage(both), critical=False)
        return builder.sign(signer, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)

    roots = b""
    for index in range(len(identity.keys)):
        signer, name = authority(index)
        roots += certificate(name, signer.public_key(), signer, name, is_authority=True)
    signer, issuer = authority(0)
    own = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, PART_NAME)])
    chain = certificate(subject, own.public_key(), signer, issuer, is_authority=False)
    private = own.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    return roots, private, chain
