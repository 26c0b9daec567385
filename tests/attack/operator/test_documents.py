"""Custom resources that reach for more than they may, and gateways that answer the operator what they like; its own code runs."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import itertools
import json
import re
import resource
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from pydantic import ValidationError

from antiphon.core.document.artifact import ModelArtifact
from antiphon.core.document.composition import CompositionOfExperts
from antiphon.core.document.spec import LLMDeployment
from antiphon_operator.api.crds import definitions
from antiphon_operator.kube.resources import DEPLOYMENT, JOB, MODEL_ARTIFACT, POD, Resource
from antiphon_operator.reconcile.artifact import ArtifactReconciler
from antiphon_operator.reconcile.composition import CompositionReconciler
from antiphon_operator.reconcile.scrape import ScrapedMetrics
from antiphon_operator.render.composition import children as router_children
from antiphon_operator.render.revision import render_revision
from antiphon_operator.render.settings import Runtime, Settings
from antiphon_operator.testing.memory_api import MemoryApi
from antiphon_operator.testing.memory_kube import MemoryKube

SETTINGS = Settings(runtime=Runtime(image="w:1", ray_version="2.60.0"))
MiB = 2**20
OWNER = {"apiVersion": "v1", "kind": "x", "name": "x", "uid": "u"}

LLM: dict[str, Any] = {
    "model": {"uri": "hf://a/b", "name": "m"},
    "pools": [{"name": "a", "role": "monolith", "env": {"GREETING": "x"}}],
    "directory": {"redisUrl": "redis://user:password@redis:6379/0"},
    "kubernetes": {"image": "i:1", "secretEnv": [{"name": "HF_TOKEN", "secret": "s", "key": "k"}]},
}
ARTIFACT: dict[str, Any] = {
    "uri": "s3://bucket/prefix",
    "revision": "main",
    "endpointUrl": "https://store/path",
    "credentialsSecret": "s",
    "image": "i:1",
}
COMPOSITION: dict[str, Any] = {
    "experts": [
        {"name": "law", "external": {"url": "https://law/v1", "model": "m", "apiKeySecret": {"name": "keys", "key": "law"}}},
        {"name": "more", "external": {"url": "https://more/v1", "model": "n"}},
    ],
    "general": "law",
    "router": {"apiKeysSecret": {"name": "door", "key": "keys"}, "artifact": {"uri": "pvc://claim/path"}},
}
KINDS: dict[str, tuple[type[Any], dict[str, Any]]] = {
    "LLMDeployment": (LLMDeployment, LLM),
    "ModelArtifact": (ModelArtifact, ARTIFACT),
    "CompositionOfExperts": (CompositionOfExperts, COMPOSITION),
}


def read(kind: str, spec: dict[str, Any]) -> Any:
    metadata = {"name": "it", "namespace": "models"}
    return KINDS[kind][0].model_validate(
        {"apiVersion": "serving.antiphon.dev/v1alpha1", "kind": kind, "metadata": metadata, "spec": spec}
    )


def rendered(kind: str, spec: dict[str, Any]) -> Any:
    """What the operator would apply."""
    document = read(kind, spec)
    if kind == "LLMDeployment":
        return render_revision(document, SETTINGS, None).ray_cluster
    if kind == "CompositionOfExperts":
        return router_children(document, OWNER, {}, SETTINGS)
    api = MemoryApi(clock=lambda: 1_700_000_000.0)
    create(api, MODEL_ARTIFACT, spec)
    asyncio.run(ArtifactReconciler(MemoryKube(api), SETTINGS, clock=lambda: 1_700_000_000.0).reconcile("models", "it"))
    return api.get(JOB, "models", "it-download")


def create(api: MemoryApi, kind: Resource, spec: dict[str, Any]) -> None:
    api.create(kind, {"metadata": {"name": "it", "namespace": "models"}, "spec": spec})


def texts(value: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[tuple[str | int, ...], str]]:
    items: Any = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else ()
    for key, inner in items:
        yield from texts(inner, (*path, key))
    if isinstance(value, str):
        yield path, value


def changed(spec: dict[str, Any], path: tuple[str | int, ...], text: str) -> dict[str, Any]:
    copy = json.loads(json.dumps(spec))
    node: Any = copy
    for step in path[:-1]:
        node = node[step]
    node[path[-1]] = text
    return copy  # type: ignore[no-any-return]


def expanded(text: str) -> str:
    """As the kubelet does it (third_party/forked/golang/expansion): $$ is one $, and $(NAME) a variable's value."""
    return re.sub(r"\$\$|\$\(([^)]*)\)", lambda match: "$" if match[0] == "$$" else f"STOLEN<{match[1]}>", text)


@pytest.mark.parametrize("kind", list(KINDS))
def test_no_field_becomes_what_a_secret_has(kind: str) -> None:
    """$(HF_TOKEN) in an address would send the token there, in a path show it in an error that the status repeats."""
    num_taken = 0
    for path, was in texts(KINDS[kind][1]):
        for text in ("$(HF_TOKEN)", f"{was}$(HF_TOKEN)", f"{was}/$(ANTIPHON_EXPERT_0_KEY)", "$$(HF_TOKEN)", f"{was}$$$(HF_TOKEN)"):
            try:
                made = rendered(kind, changed(KINDS[kind][1], path, text))
            except ValidationError:
                continue
            num_taken += 1
            for where, value in texts(made):
                if where[-1] == "value" or {"args", "command"} & set(where):
                    assert "STOLEN" not in expanded(value), (path, where, value)
                    assert text.count("$") == expanded(value).count("$") or "HF_TOKEN" not in value, (path, where, value)
    assert num_taken > 3


ADDRESSES = [
    "http://169.254.169.254/v1",
    "http://169.254.169.254./v1",
    "http://2852039166/v1",
    "http://0xa9fea9fe/v1",
    "http://0251.0376.0251.0376/v1",
    "http://[fe80::1]/v1",
    "http://[::ffff:169.254.169.254]/v1",
    "http://[fd00:ec2::254]/v1",
    "http://[64:ff9b::169.254.169.254]/v1",
    "http://168.63.129.16/v1",
    "http://0.0.0.0/v1",
    "https://user:password@law/v1",
    "https://law@evil.example/v1",
    "http:///v1",
    "http://law:0/v1",
    "file:///etc/passwd",
    "gopher://law/v1",
    "https://law/v1\nx: y",
    "https://law/v1\u2028",
    "https://" + "a" * 1100,
]


@pytest.mark.parametrize("url", ADDRESSES)
def test_an_address_of_the_nodes_own_network_or_with_a_password_is_refused(url: str) -> None:
    for kind, path in (("CompositionOfExperts", ("experts", 0, "external", "url")), ("ModelArtifact", ("endpointUrl",))):
        with pytest.raises(ValidationError):
            read(kind, changed(KINDS[kind][1], path, url))


@pytest.mark.parametrize("uri", ["pvc://claim/../../etc", "pvc://claim/%2e%2e/x", "pvc://claim/a/..", "pvc://claim/x\n- y"])
def test_a_routers_artifact_stays_in_its_claim(uri: str) -> None:
    with pytest.raises(ValidationError):
        read("CompositionOfExperts", changed(COMPOSITION, ("router", "artifact", "uri"), uri))


@pytest.mark.parametrize("kind", list(KINDS))
def test_no_text_of_a_document_begins_a_line_or_is_without_end(kind: str) -> None:
    for path, was in texts(KINDS[kind][1]):
        for text in (f"{was}\n- evil: true", f"{was}\r", f"{was}\x00", f"{was}\x1b[2J", was + "a" * 100_000):
            if path[-2:] == ("env", "GREETING") and "\x00" not in text and len(text) < 100_000:
                continue  # a variable may have any text: it stays one value
            with pytest.raises(ValidationError):
                read(kind, changed(KINDS[kind][1], path, text))


def test_every_list_map_and_text_of_the_kinds_has_an_end() -> None:
    def nodes(node: dict[str, Any], path: str) -> Iterator[tuple[str, dict[str, Any]]]:
        yield path, node
        for name, inner in node.get("properties", {}).items():
            yield from nodes(inner, f"{path}.{name}")
        for key in ("items", "additionalProperties"):
            if isinstance(node.get(key), dict):
                yield from nodes(node[key], f"{path}[]")

    def has_end(pattern: str) -> bool:
        return not set("*+") & set(pattern)

    endless = []
    for definition in definitions():
        schema = definition["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
        for path, node in nodes(schema["properties"]["spec"], definition["spec"]["names"]["kind"]):
            bound = {"string": ("maxLength", "enum"), "array": ("maxItems",)}.get(node.get("type", ""), ())
            if "additionalProperties" in node:
                bound = ("maxProperties",)
            if bound and not any(name in node for name in bound) and not has_end(node.get("pattern", "*")):
                endless.append(path)
    assert endless == []


def test_an_experts_secret_goes_to_the_hosts_that_it_names_itself_and_no_document_names_them() -> None:
    """Whatever a composition says, the list of hosts of a key is a key of the same Secret, and without it the key stays."""
    for name, key, url in itertools.product(("keys", "door"), ("law", "keys"), ("https://law/v1", "https://evil.example/v1")):
        spec = json.loads(json.dumps(COMPOSITION))
        spec["experts"][0]["external"] |= {"url": url, "apiKeySecret": {"name": name, "key": key}}
        (deployment,) = [each for each in rendered("CompositionOfExperts", spec) if each["kind"] == DEPLOYMENT.kind]
        (container,) = deployment["spec"]["template"]["spec"]["containers"]
        variables = {each["name"]: each for each in container["env"]}
        hosts = variables["ANTIPHON_EXPERT_0_KEY_HOSTS"]["valueFrom"]["secretKeyRef"]
        assert (hosts["name"], hosts["key"]) == (name, f"{key}.hosts")
        assert variables["ANTIPHON_EXPERT_KEY_HOSTS"]["value"] == "required"
        assert [each["name"] for each in container["env"]].count("ANTIPHON_EXPERT_KEY_HOSTS") == 1


Say = Callable[[Any], None]


def endless(wfile: Any) -> None:
    wfile.write(b"content-type: text/plain\r\n\r\n")
    for _ in range(4096):
        wfile.write(b"# " + b"x" * MiB + b"\n")


def bomb(wfile: Any) -> None:
    """A GiB, in the end."""
    wfile.write(b"content-type: text/plain\r\ncontent-encoding: gzip\r\n\r\n")
    with gzip.GzipFile(fileobj=wfile, mode="wb", compresslevel=1) as packed:
        for _ in range(1024):
            packed.write(bytes(MiB))


def body(text: bytes) -> Say:
    def say(wfile: Any) -> None:
        wfile.write(b"content-type: text/plain\r\ncontent-length: %d\r\n\r\n" % len(text) + text)

    return say


GATEWAYS: dict[str, Say] = {
    "a body without end": endless,
    "a bomb": bomb,
    "no number": body(b"vllm:num_requests_waiting NaN\n"),
    "infinite": body(b"vllm:kv_cache_usage_perc +Inf\n"),
    "no label le": body(b"gen_ai_server_time_to_first_token_seconds_bucket 1\n"),
    "labels without an end": body(b'vllm:num_requests_waiting{a="' + b"\\" * 100_000),
    "many braces": body(b"{" * 1_000_000),
    "no text": body(b"\xff\xfe\x00" * 1000),
    "a line of 4 MiB": body(b"a" * (4 * MiB)),
    "many labels": body(b"vllm:num_requests_waiting{" + b",".join(b'a%d="x"' % i for i in range(20_000)) + b"} 1\n"),
}


@pytest.mark.parametrize("says", list(GATEWAYS))
def test_what_a_gateway_answers_ends_no_pass_and_takes_no_memory(says: str) -> None:
    """The pod behind a deployment's Service is an image that its writer chose, and the operator is the whole cluster's."""

    class Gateway(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.wfile.write(b"HTTP/1.1 200 OK\r\nconnection: close\r\n")
            with contextlib.suppress(OSError):
                GATEWAYS[says](self.wfile)
            self.close_connection = True

        def log_message(self, *_: object) -> None:
            return

    server = ThreadingHTTPServer(("127.0.0.1", 0), Gateway)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    document = read("LLMDeployment", LLM)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    turns = 0

    async def read_once() -> Any:
        nonlocal turns

        async def turn() -> None:
            nonlocal turns
            while True:
                turns += 1
                await asyncio.sleep(0.01)

        async with ScrapedMetrics(clock=lambda: 0.0, url_of=lambda *_: f"http://127.0.0.1:{server.server_port}/metrics") as scraped:
            task = asyncio.create_task(turn())
            found = await scraped.read("models", document)
            task.cancel()
            return found

    try:
        found = asyncio.run(read_once())
    finally:
        server.shutdown()
        server.server_close()
    assert not found or found["a"].num_waiting in (None, 1.0)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert grown < 160 * MiB, grown


@pytest.mark.parametrize(
    "said", ["[" * 4000, '{"digest": ' * 300, '{"digest": {"a": []}, "sizeBytes": 1e999}', '{"sizeBytes": "x"}', "\x00"]
)
def test_what_a_download_says_at_its_end_ends_no_pass(said: str) -> None:
    """Its image is the document's choice, too."""
    api = MemoryApi(clock=lambda: 1_700_000_000.0)
    create(api, MODEL_ARTIFACT, ARTIFACT)
    reconciler = ArtifactReconciler(MemoryKube(api), SETTINGS, clock=lambda: 1_700_000_000.0)
    asyncio.run(reconciler.reconcile("models", "it"))
    job = api.get(JOB, "models", "it-download")
    assert job is not None
    for condition, code in (("Complete", 0), ("Failed", 1)):
        conditions = [{"type": condition, "status": "True", "message": said}]
        api.update(JOB, {**job, "status": {"conditions": conditions}}, manager="x", subresource="status")
        job = api.get(JOB, "models", "it-download")
        assert job is not None
        labels = job["spec"]["template"]["metadata"]["labels"]
        name = f"pod-{code}"
        api.create(POD, {"metadata": {"name": name, "namespace": "models", "labels": labels}, "spec": {"containers": []}})
        ended = {"state": {"terminated": {"exitCode": code, "message": said}}}
        pod = api.get(POD, "models", name)
        assert pod is not None
        api.update(POD, {**pod, "status": {"containerStatuses": [ended]}}, manager="x", subresource="status")
        asyncio.run(reconciler.reconcile("models", "it"))
        live = api.get(MODEL_ARTIFACT, "models", "it")
        assert live is not None
        assert live["status"]["phase"] in ("Cached", "Failed")


def test_reconcilers_refuse_in_the_status_what_the_api_server_let_through() -> None:
    api = MemoryApi(clock=lambda: 1_700_000_000.0)
    spec = changed(COMPOSITION, ("experts", 0, "external", "url"), "http://169.254.169.254/v1")
    from antiphon_operator.kube.resources import COMPOSITION as KIND

    create(api, KIND, spec)
    asyncio.run(CompositionReconciler(MemoryKube(api), SETTINGS, clock=lambda: 1_700_000_000.0).reconcile("models", "it"))
    live = api.get(KIND, "models", "it")
    assert live is not None
    assert "link-local" in json.dumps(live["status"])
    assert api.get(DEPLOYMENT, "models", "it-router") is None
