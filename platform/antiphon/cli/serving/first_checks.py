"""Mistakes that can be told before anything slow starts: ports, files, memory, descriptors, compiler (control speed).

Each names the field, or the command to run. Must not know: how anything is started.
"""

from __future__ import annotations

import errno
import json
import resource
import socket
from collections.abc import Mapping
from pathlib import Path

import psutil

from antiphon.apps.devices import deal
from antiphon.apps.serve.deployment_set import Serving
from antiphon.apps.serve.kernels import no_compiler
from antiphon.cli.serving.checkpoint_files import FilesWrong, weights_bytes
from antiphon.core.document.serving import EndpointSpec
from antiphon.core.document.spec import LLMDeployment
from antiphon.core.errors import AntiphonError, InvalidInput, Problem, SpecInvalid
from antiphon.core.ids import Role
from antiphon.device.driver import look_for_cards

LEAST_FILES = 1024  # Ray, its workers' links and connections


def check(serving: Serving) -> None:
    """Everything that is known at once.

    Raises:
        InvalidInput: a pool asks for a card that is not there.
        SpecInvalid: names every wrong field.
    """
    deal(serving.deployments, look_for_cards)
    problems = [
        *_ports(serving.endpoint),
        *[problem for document in serving.deployments for problem in _checkpoint(document)],
        *_memory(serving),
        *_files(),
        *_kernels(serving),
    ]
    if problems:
        raise SpecInvalid(problems)


def check_checkpoints(serving: Serving) -> None:
    """The same of models that had to be found first: they are on this machine now, and nothing slow has started.

    Raises:
        SpecInvalid: a checkpoint lacks a file, or its KV blocks can't fit into the machine.
    """
    problems = [
        problem
        for document in serving.deployments
        for problem in _files_of(document, Path(serving.checkpoints[document.metadata.name]))
    ]
    if problems := [*problems, *_memory(serving)]:
        raise SpecInvalid(problems)


def _ports(endpoint: EndpointSpec) -> list[Problem]:
    found = []
    for field, option, port in (
        ("spec.endpoint.httpPort", "--port", endpoint.http_port),
        ("spec.endpoint.grpcPort", "--grpc-port", endpoint.grpc_port),
    ):
        if port == 0:
            continue
        family = socket.AF_INET6 if ":" in endpoint.host else socket.AF_INET
        try:
            with socket.socket(family, socket.SOCK_STREAM) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind((endpoint.host, port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                message = f"port {port} of {endpoint.host} is taken; {option} 0 takes any free one"
            else:
                message = f"can't listen on {endpoint.host}:{port}: {error.strerror or error}"
            found.append(Problem(path=field, message=message))
        except OverflowError as error:
            found.append(Problem(path=field, message=str(error)))
    if endpoint.http_port == endpoint.grpc_port != 0:
        found.append(Problem(path="spec.endpoint.grpcPort", message=f"is {endpoint.grpc_port}, as httpPort"))
    return found


def _checkpoint(document: LLMDeployment) -> list[Problem]:
    uri = document.spec.model.uri
    if "://" in uri and not uri.startswith("file://"):
        return []
    from antiphon.models.loading.source import local_path

    try:
        path = local_path(uri)
        if path.is_file() and path.suffix == ".gguf":
            return []
        if not path.is_dir():
            return [_of_model(document, f"{path}: {'not a directory or .gguf file' if path.exists() else 'no such directory'}")]
    except InvalidInput as error:
        return [_of_model(document, str(error))]
    except OSError as error:
        return [_of_model(document, f"{path} can't be read: {error.strerror or error}")]
    return _files_of(document, path)


def _files_of(document: LLMDeployment, path: Path) -> list[Problem]:
    try:
        num_bytes = weights_bytes(path, 4 if document.spec.model.dtype == "float32" else 2)
    except FilesWrong as error:
        return [_of_model(document, str(error))]
    total = psutil.virtual_memory().total
    if num_bytes > total and all(pool.worker_device == "cpu" for pool in document.spec.pools):
        message = f"{path}: the weights take {num_bytes / 2**30:.1f} GiB in memory, this machine has {total / 2**30:.1f} GiB"
        return [_of_model(document, message)]
    from antiphon.models.pooling.facts import read_pooling, wrong_topology

    try:
        why = wrong_topology(document.spec.topology, read_pooling(path, document.spec.model.task))
    except AntiphonError as error:
        return [_of_model(document, str(error))]
    return [] if why is None else [Problem(path=f"{document.metadata.name}: spec.topology", message=why)]


def _of_model(document: LLMDeployment, message: str) -> Problem:
    return Problem(path=f"{document.metadata.name}: spec.model.uri", message=message)


def _memory(serving: Serving) -> list[Problem]:
    """KV blocks that can't fit into the machine, all workers together."""
    total = psutil.virtual_memory().total
    wanted = 0.0
    shown = []
    for document in serving.deployments:
        cache = document.spec.cache
        workers = sum(
            pool.replicas for pool in document.spec.pools if Role(pool.role).holds_attention and pool.worker_device == "cpu"
        )
        if cache.num_blocks is None:
            each, field = float(cache.host_memory_bytes), "spec.cache.memory"
        else:
            each, field = (
                float(_token_bytes(document, serving.checkpoints) * cache.num_blocks * cache.block_size_tokens),
                "spec.cache.numBlocks",
            )
        wanted += each * workers
        shown.append((f"{document.metadata.name}: {field}", each, workers))
    if wanted <= total:
        return []
    path, each, workers = max(shown, key=lambda item: item[1] * item[2])
    message = (
        f"{workers} worker{'' if workers == 1 else 's'} with {each / 2**30:.1f} GiB of KV blocks each don't fit into this "
        f"machine's {total / 2**30:.1f} GiB"
    )
    return [Problem(path=path, message=message)]


def _token_bytes(document: LLMDeployment, checkpoints: Mapping[str, str]) -> int:
    """KV bytes per token in the document's type, from a config.json that is at hand; 0 where there is none."""
    from antiphon.models.loading.source import local_path

    uri, found = document.spec.model.uri, checkpoints.get(document.metadata.name)
    if found is None and "://" in uri and not uri.startswith("file://"):
        return 0
    config = (Path(found) if found is not None else local_path(uri)) / "config.json"
    if not config.is_file():
        return 0
    try:
        raw = json.loads(config.read_bytes())
        heads = int(raw.get("num_key_value_heads") or raw["num_attention_heads"])
        head_dim = int(raw.get("head_dim") or raw["hidden_size"] // raw["num_attention_heads"])
        itemsize = 4 if document.spec.model.dtype == "float32" else 2
        if raw.get("kv_lora_rank"):
            return int(raw["num_hidden_layers"]) * (int(raw["kv_lora_rank"]) + int(raw["qk_rope_head_dim"])) * itemsize
        return int(raw["num_hidden_layers"]) * heads * head_dim * 2 * itemsize
    except (ValueError, KeyError, TypeError, ArithmeticError, AttributeError, RecursionError):
        return 0  # reading the model says what is wrong with it


def _files() -> list[Problem]:
    """Raise the limit of open files as far as this process may; say so where that is too little."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= LEAST_FILES:
        return []
    wanted = LEAST_FILES if hard == resource.RLIM_INFINITY else min(hard, LEAST_FILES)
    if wanted > soft:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    if wanted >= LEAST_FILES:
        return []
    message = f"{wanted} open files are allowed, {LEAST_FILES} are needed: ulimit -n {LEAST_FILES}"
    return [Problem(path="open files", message=message)]


def _kernels(serving: Serving) -> list[Problem]:
    """Workers on CPUs would be several times slower without kernels: nobody shall find that out by measuring."""
    if all(pool.worker_device != "cpu" for document in serving.deployments for pool in document.spec.pools):
        return []
    why = no_compiler()
    return [] if why is None else [Problem(path="kernels", message=why)]
