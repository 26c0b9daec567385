"""Downloads weights into a claim, inside the Job of a ModelArtifact (control speed).

Files go into a directory beside the wanted one, which is renamed when all are there and the digest is right: a directory that
exists is whole. huggingface_hub and minio speak to their services. Must not know: Kubernetes.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import urllib.parse
from dataclasses import dataclass
from pathlib import Path

from antiphon.core.errors import CheckpointInvalid, InvalidInput, Unavailable

_CHUNK_BYTES = 8 << 20
_DIGEST_FILE = ".antiphon-digest"


@dataclass(frozen=True, slots=True, kw_only=True)
class Fetched:
    """What was downloaded."""

    digest: str
    size_bytes: int


def digest_of(directory: Path) -> Fetched:
    """sha256 over the sorted lines "<sha256 of the file>  <path>" of all files, and their bytes together."""
    lines, size_bytes = [], 0
    for path in sorted(p for p in directory.rglob("*") if p.is_file() and p.name != _DIGEST_FILE):
        relative = path.relative_to(directory)
        if ".cache" in relative.parts:
            continue  # bookkeeping of the download library
        sha = hashlib.sha256()
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK_BYTES):
                sha.update(chunk)
        lines.append(f"{sha.hexdigest()}  {relative.as_posix()}\n")
        size_bytes += path.stat().st_size
    lines.sort(key=lambda line: line.partition("  ")[2])
    return Fetched(digest=f"sha256:{hashlib.sha256(''.join(lines).encode()).hexdigest()}", size_bytes=size_bytes)


def fetch(
    uri: str, into: Path, *, revision: str | None = None, digest: str | None = None, endpoint_url: str | None = None
) -> Fetched:
    """Bring ``uri`` to the directory ``into``; does nothing when a whole one with the right digest is there.

    Raises:
        InvalidInput: the uri is of no known scheme.
        Unavailable: the source did not answer, or has no such thing.
        CheckpointInvalid: what arrived is empty or does not have ``digest``.
    """
    if into.exists():
        present = digest_of(into)
        if digest is None or present.digest == digest:
            return present
        shutil.rmtree(into)
    part = into.with_name(into.name + ".part")
    part.mkdir(parents=True, exist_ok=True)
    scheme, _, rest = uri.partition("://")
    match scheme:
        case "hf":
            _from_hugging_face(rest, part, revision)
        case "s3":
            _from_s3(rest, part, endpoint_url)
        case "file":
            source = Path(urllib.parse.unquote(rest))
            if not source.is_dir():
                raise Unavailable(f"{uri} is not a directory here")
            shutil.copytree(source, part, dirs_exist_ok=True)
        case _:
            raise InvalidInput(f"{uri}: the scheme must be hf, s3 or file", "uri")
    fetched = digest_of(part)
    if fetched.size_bytes == 0:
        raise CheckpointInvalid(f"{uri} holds no files")
    if digest is not None and fetched.digest != digest:
        raise CheckpointInvalid(f"{uri} has digest {fetched.digest}, {digest} was asked for")
    part.rename(into)
    return fetched


def _from_hugging_face(repository: str, into: Path, revision: str | None) -> None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        snapshot_download(repository, revision=revision, local_dir=into)
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise Unavailable(f"hf://{repository}: {error}") from error


def _from_s3(rest: str, into: Path, endpoint_url: str | None) -> None:
    from minio import Minio
    from minio.credentials.providers import EnvAWSProvider
    from minio.error import MinioException
    from urllib3.exceptions import HTTPError

    from antiphon_operator.store_connections import open_pool

    bucket, _, prefix = rest.partition("/")
    prefix = prefix.strip("/")
    address = urllib.parse.urlsplit(endpoint_url if endpoint_url is not None else "https://s3.amazonaws.com")
    try:
        client = Minio(
            endpoint=address.netloc,
            credentials=EnvAWSProvider() if "AWS_ACCESS_KEY_ID" in os.environ else None,
            region=os.environ.get("AWS_REGION"),
            secure=address.scheme == "https",
            http_client=open_pool(),
        )
        for item in client.list_objects(bucket_name=bucket, prefix=f"{prefix}/" if prefix else "", recursive=True):
            key = str(item.object_name)
            relative = key.removeprefix(prefix).lstrip("/")
            target = (into / relative).resolve()
            if not relative or relative.endswith("/"):
                continue
            if not target.is_relative_to(into.resolve()):
                raise CheckpointInvalid(f"s3://{rest}: the key {key!r} leaves the directory")
            if target.exists() and target.stat().st_size == item.size:
                continue  # an earlier try brought it
            client.fget_object(bucket_name=bucket, object_name=key, file_path=str(target))
    except (MinioException, HTTPError, ValueError) as error:
        raise Unavailable(f"s3://{rest}: {error}") from error
