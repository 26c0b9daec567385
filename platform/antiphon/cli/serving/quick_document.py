"""A document from a model's name and a few options, as text that people can keep and edit (control speed).

Must not know: how anything is served.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path

from antiphon.core.document.part import MAX_NAME_LENGTH
from antiphon.core.document.spec import API_VERSION, ROLES_OF, Topology
from antiphon.core.errors import InvalidInput
from antiphon.core.ids import Role

API_KEYS_ENV = "ANTIPHON_API_KEYS"

_HUB = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_POOL_NOTES = {
    Role.MONOLITH: "whole layers in one process",
    Role.PREFILL: "computes prompts and hands their KV over",
    Role.DECODE: "whole layers; goes on where prefill ends",
    Role.ATTENTION: "KV cache, attention halves, sampler; no FFN weights",
    Role.FFN: "FFN weights only; stateless",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Wishes:
    """What was said on the command line; None = nothing."""

    topology: Topology = Topology.MONOLITH
    dtype: str | None = None
    device: str | None = None
    host: str | None = None
    http_port: int | None = None
    grpc_port: int | None = None
    with_keys: bool = False


def is_document(model: str) -> bool:
    """Whether an argument names a file of documents rather than a model."""
    return Path(model).suffix in (".yaml", ".yml") or model == "-"


def uri_of(model: str) -> str:
    """The uri that a model's name stands for: a uri, a directory, a GGUF file, or org/name on the hub.

    Raises:
        InvalidInput: it is none of these.
    """
    if "://" in model:
        return model
    try:
        path = Path(model).expanduser()
        if path.is_dir() or (path.is_file() and path.suffix == ".gguf"):
            return str(path.resolve())
        is_there = path.exists()
    except (OSError, RuntimeError, ValueError) as error:  # no right to look, no home, no path at all
        why = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise InvalidInput(f"{model} can't be read: {why}", "model") from error
    if is_there:
        raise InvalidInput(f"{model}: neither a checkpoint directory, a .gguf file nor a .yaml document", "model")
    if _HUB.fullmatch(model) and not model.startswith((".", "~")):
        return f"hf://{model}"
    raise InvalidInput(f"{model}: no such directory or file; models of the Hugging Face hub are org/name", "model")


def name_of(uri: str) -> str:
    """A deployment's name from its model's uri: a DNS label."""
    last = uri.rstrip("/").rpartition("/")[2].removesuffix(".gguf")
    label = re.sub(r"[^a-z0-9]+", "-", last.lower()).strip("-")[:MAX_NAME_LENGTH].strip("-")
    return label if label and label[0].isalpha() else f"m-{label}"[:MAX_NAME_LENGTH].strip("-")


def document_text(model: str, wishes: Wishes) -> str:
    """The document, with a comment wherever there is a choice to make.

    Raises:
        InvalidInput: the model can't be one.
    """
    uri = uri_of(model)
    roles = ROLES_OF[wishes.topology]
    # A laptop's processors are shared out; what takes turns (attention, FFN) may use them all.
    threads = max(1, (os.cpu_count() or 1) // len(roles))
    lines = [
        f"apiVersion: {API_VERSION}",
        "kind: LLMDeployment",
        f"metadata: {{name: {name_of(uri)}}}",
        "spec:",
        "  model:",
        f"    uri: {json.dumps(uri)}",
        f"    dtype: {wishes.dtype or 'auto'}  # auto = the checkpoint's; float32 | bfloat16",
        f"  topology: {wishes.topology.value}  # monolith | pd | afd | pd-afd",
        "  pools:",
    ]
    for role in roles:
        device = "" if wishes.device is None else f", device: {wishes.device}"
        pool = f"{{name: {role.value}, role: {role.value}, replicas: 1{device}, resources: {{cpu: {json.dumps(str(threads))}}}}}"
        lines.append(f"    - {pool}  # {_POOL_NOTES[role]}")
    lines += ["  cache: {memory: 1Gi}  # for KV blocks, per worker", "  endpoint:"]
    lines.append(
        f"    host: {json.dumps(wishes.host or '127.0.0.1')}  # 0.0.0.0 = reachable from other machines: set API keys then"
    )
    lines.append(f"    httpPort: {8000 if wishes.http_port is None else wishes.http_port}  # 0 = any free port")
    lines.append(f"    grpcPort: {9000 if wishes.grpc_port is None else wishes.grpc_port}")
    if wishes.with_keys:
        lines.append(f"    apiKeysEnv: {API_KEYS_ENV}  # the variable that holds the keys")
    return "\n".join(lines) + "\n"
