"""The antiphon-operator command: run, crds, plan, fetch (control speed).

Must not know: how any of them works.
"""

from __future__ import annotations

import asyncio
import json
import logging
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from pydantic import ValidationError

from antiphon.core.document.spec import LLMDeployment
from antiphon.core.errors import AntiphonError, InvalidInput, Problem, SpecInvalid
from antiphon_operator.render.settings import Runtime, Settings

app = typer.Typer(help="The Kubernetes operator of Antiphon.", no_args_is_help=True, add_completion=False)
DEFAULT_IMAGE = "antiphon/worker:0.1.0"
DEFAULT_RAY_VERSION = "2.60.0"
MAX_TERMINATION_MESSAGE = 1000  # characters; the kubelet keeps 4096 bytes

Image = Annotated[str, typer.Option(envvar="ANTIPHON_WORKER_IMAGE", help="Default image of head and workers.")]
RayVersion = Annotated[str, typer.Option(envvar="ANTIPHON_RAY_VERSION", help="Ray's version inside the default image.")]


@app.command("run")
def run_command(
    image: Image = DEFAULT_IMAGE,
    ray_version: RayVersion = DEFAULT_RAY_VERSION,
    kubeconfig: Annotated[str | None, typer.Option(help="A kubeconfig; without it the pod's own credentials.")] = None,
    namespaces: Annotated[
        str, typer.Option(envvar="ANTIPHON_NAMESPACES", help="Watched namespaces, comma-separated; empty = all.")
    ] = "",
    own_namespace: Annotated[str, typer.Option(envvar="POD_NAMESPACE", help="Namespace of the lease.")] = "default",
    pod_name: Annotated[str, typer.Option(envvar="POD_NAME", help="Name that the lease shows; empty = the host's.")] = "",
    leader_election: Annotated[bool, typer.Option(help="Act only while holding the lease.")] = True,
    port: Annotated[int, typer.Option(help="Health and metrics.")] = 8080,
    log_level: Annotated[str, typer.Option(envvar="ANTIPHON_LOG_LEVEL", help="Level of the logs.")] = "INFO",
    metrics_namespace_labels: Annotated[
        str, typer.Option(envvar="ANTIPHON_METRICS_NAMESPACE_LABELS", help="k=v,k=v of namespaces that may scrape.")
    ] = "",
    gateway_cpu: Annotated[str, typer.Option(envvar="ANTIPHON_GATEWAY_CPU", help="Processors asked for a gateway pod.")] = "250m",
    gateway_memory: Annotated[str, typer.Option(envvar="ANTIPHON_GATEWAY_MEMORY", help="Memory of a gateway pod.")] = "1280Mi",
    head_cpu: Annotated[str, typer.Option(envvar="ANTIPHON_HEAD_CPU", help="Processors asked for the head of Ray.")] = "300m",
    head_memory: Annotated[str, typer.Option(envvar="ANTIPHON_HEAD_MEMORY", help="Memory of Ray's head.")] = "2Gi",
    router_image: Annotated[str, typer.Option(envvar="ANTIPHON_ROUTER_IMAGE", help="Image of routers; empty = --image.")] = "",
    artifact_image: Annotated[
        str, typer.Option(envvar="ANTIPHON_ARTIFACT_IMAGE", help="Image of downloads; empty = --image.")
    ] = "",
) -> None:
    """Watch and reconcile until stopped; exits non-zero when the lease is lost."""
    from antiphon_operator.controller.observability import configure_logs
    from antiphon_operator.controller.run import Options, run

    configure_logs(log_level.upper())
    labels = dict(pair.split("=", 1) for pair in metrics_namespace_labels.split(",") if pair)
    settings = Settings(
        runtime=Runtime(image=image, ray_version=ray_version),
        metrics_namespace_labels=labels,
        gateway_cpu=gateway_cpu,
        gateway_memory=gateway_memory,
        head_cpu=head_cpu,
        head_memory=head_memory,
        router_image=router_image,
        artifact_image=artifact_image,
    )
    options = Options(
        settings=settings,
        kubeconfig=kubeconfig,
        namespaces=tuple(name for name in namespaces.split(",") if name),
        own_namespace=own_namespace,
        pod_name=pod_name,
        elect=leader_election,
        port=port,
    )
    try:
        asyncio.run(run(options))
    except AntiphonError as error:
        logging.getLogger(__name__).error("stopped: %s", error)  # noqa: TRY400 - it is told, not a bug
        sys.exit(1)


@app.command()
def crds() -> None:
    """Print the CustomResourceDefinitions."""
    from antiphon_operator.api.crds import definitions

    typer.echo(render_crds(definitions()), nl=False)


def render_crds(values: tuple[dict[str, Any], ...]) -> str:
    """The definitions as one YAML stream, as the chart has them."""
    return yaml.safe_dump_all(values, sort_keys=False, width=120, allow_unicode=True)


@app.command()
def plan(
    to: Annotated[Path, typer.Option("--to", help="The document as it shall be.")],
    from_: Annotated[Path | None, typer.Option("--from", help="The document as it is; without it, nothing runs.")] = None,
    image: Image = DEFAULT_IMAGE,
    ray_version: RayVersion = DEFAULT_RAY_VERSION,
    output: Annotated[str, typer.Option(help="text or json.")] = "text",
) -> None:
    """Print the steps of a rollout before it happens."""
    from antiphon_operator.planning.preview import preview_documents

    settings = Settings(runtime=Runtime(image=image, ray_version=ray_version))
    lines = preview_documents(None if from_ is None else load(from_), load(to), settings)
    if output == "json":
        typer.echo(json.dumps([{"step": i, **line.as_json()} for i, line in enumerate(lines, 1)], indent=2))
        return
    for number, line in enumerate(lines, 1):
        typer.echo(f"{number}. {line.text}")


@app.command()
def fetch(
    uri: Annotated[str, typer.Option(help="hf://, s3:// or file://.")],
    into: Annotated[Path, typer.Option(help="Directory to make.")],
    revision: Annotated[str | None, typer.Option(help="Revision of the source.")] = None,
    digest: Annotated[str | None, typer.Option(help="sha256:… that it must have.")] = None,
    endpoint_url: Annotated[str | None, typer.Option(help="Address of an S3-compatible store.")] = None,
    result: Annotated[Path, typer.Option(help="Where to write digest and size.")] = Path("/tmp/result"),  # noqa: S108
) -> None:
    """Download weights; used by the Job of a ModelArtifact."""
    from antiphon_operator.fetch import fetch as fetch_weights
    from antiphon_operator.weight_sizes import sizes_in

    try:
        fetched = fetch_weights(uri, into, revision=revision, digest=digest, endpoint_url=endpoint_url)
    except AntiphonError as error:
        result.write_text(str(error)[:MAX_TERMINATION_MESSAGE], encoding="utf-8")  # the condition repeats it
        raise
    found = sizes_in(into)
    value: dict[str, str | int] = {"digest": fetched.digest, "sizeBytes": fetched.size_bytes}
    if found.ffn_bytes:
        value["ffnBytes"] = found.ffn_bytes
    if found.kv_bytes_per_token:
        value["kvBytesPerToken"] = found.kv_bytes_per_token
    if found.state_bytes:
        value["stateBytes"] = found.state_bytes
    result.write_text(json.dumps(value), encoding="utf-8")
    typer.echo(f"{fetched.digest} {fetched.size_bytes} bytes")


def load(path: Path) -> LLMDeployment:
    """The first LLMDeployment of a YAML file.

    Raises:
        SpecInvalid: it has wrong fields.
        InvalidInput: the file can't be read or holds none.
    """
    try:
        values = list(yaml.safe_load_all(path.read_text(encoding="utf-8")))
    except (OSError, yaml.YAMLError) as error:
        raise InvalidInput(f"{path}: {error}") from error
    for value in values:
        if isinstance(value, dict) and value.get("kind") == "LLMDeployment":
            try:
                return LLMDeployment.model_validate(value)
            except ValidationError as error:
                problems = [
                    Problem(path=".".join(str(part) for part in e["loc"]), message=e["msg"])
                    for e in error.errors(include_input=False)
                ]
                raise SpecInvalid(problems) from error
    raise InvalidInput(f"{path} holds no LLMDeployment")


def main() -> None:
    """Entry point of the ``antiphon-operator`` script."""
    try:
        app()
    except ModuleNotFoundError as error:
        missing = (error.name or "antiphon").partition(".")[0]
        if missing.startswith("antiphon"):
            raise
        typer.echo(f"error: antiphon-operator needs {missing}: pip install 'antiphon[operator]'", err=True)
        sys.exit(1)
    except AntiphonError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(1)
