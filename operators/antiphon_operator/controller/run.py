"""The operator's process: configuration, leadership, controller, health (control speed).

    start --> waiting for the lease (healthy, not leading) --> leading, watching, reconciling --> lease lost or stopped --> exit

Must not know: how anything is reconciled.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass

import kopf
from lightkube.config.kubeconfig import SingleConfig

from antiphon_operator.controller.handlers import Controller
from antiphon_operator.controller.leader import LeaderElection
from antiphon_operator.controller.observability import HealthServer, OperatorMetrics
from antiphon_operator.controller.resync import Resync
from antiphon_operator.kube.base import Kube, KubeError
from antiphon_operator.kube.resources import COMPOSITION, LLM_DEPLOYMENT, MODEL_ARTIFACT
from antiphon_operator.kube.rest import RestKube, load_config
from antiphon_operator.reconcile.artifact import ArtifactReconciler
from antiphon_operator.reconcile.composition import CompositionReconciler
from antiphon_operator.reconcile.gateways import AskedGateways
from antiphon_operator.reconcile.llm.reconciler import LLMReconciler
from antiphon_operator.reconcile.scrape import ScrapedMetrics
from antiphon_operator.reconcile.tiers import ScrapedTiers
from antiphon_operator.render.settings import Settings

_LOG = logging.getLogger(__name__)
LEASE_NAME = "antiphon-operator"


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How the process runs."""

    settings: Settings
    kubeconfig: str | None = None
    namespaces: Sequence[str] = ()  # watched; empty = all
    own_namespace: str = "default"
    pod_name: str = ""  # who leads, for people; empty = the host's name
    elect: bool = True
    host: str = "0.0.0.0"  # noqa: S104 - the kubelet and Prometheus come from other machines
    port: int = 8080
    num_workers: int = 8


async def run(options: Options) -> None:
    """Run until a signal stops it, the lease is lost or the task is cancelled.

    Raises:
        LeadershipLost: another replica may act now; the process must end.
        InvalidInput: there is no cluster to talk to.
    """
    config = load_config(options.kubeconfig)
    metrics = OperatorMetrics()
    identity = f"{options.pod_name or socket.gethostname()}-{uuid.uuid4().hex[:8]}"
    async with (
        RestKube(config) as kube,
        RestKube(config) as streams,  # connections of their own: a watch keeps one for minutes
        HealthServer(metrics, host=options.host, port=options.port, ready=lambda: True),
        ScrapedMetrics(clock=time.time) as measured,
        ScrapedTiers() as tiers,
        AskedGateways() as gateways,
    ):

        async def look(door: Kube, namespace: str, name: str) -> float | None:
            reconciler = LLMReconciler(door, options.settings, clock=time.time, metrics=measured, gateways=gateways)
            return await reconciler.reconcile(namespace, name)

        reconcilers = {
            LLM_DEPLOYMENT.kind: LLMReconciler(
                kube, options.settings, clock=time.time, metrics=measured, gateways=gateways, on_stage=metrics.stage
            ).reconcile,
            COMPOSITION.kind: CompositionReconciler(kube, options.settings, clock=time.time, tiers=tiers).reconcile,
            MODEL_ARTIFACT.kind: ArtifactReconciler(kube, options.settings, clock=time.time).reconcile,
        }
        controller = Controller(
            reconcilers,
            metrics=metrics,
            login=lambda: connection_of(config),
            namespaces=options.namespaces,
            num_workers=options.num_workers,
            identity=identity,
            kube=streams,
            resting=lambda unsettled, looked: Resync(kube, look, unsettled=unsettled, on_pass=looked),
        )
        if not options.elect:
            metrics.leading.set(1)
            await controller.run()
            return
        election = LeaderElection(kube, namespace=options.own_namespace, name=LEASE_NAME, identity=identity, clock=time.monotonic)
        _LOG.info("waiting for the lease", extra={"identity": identity})
        if not await _acquired(election):
            return
        _LOG.info("leading", extra={"identity": identity})
        metrics.leading.set(1)
        try:
            await _lead(election, controller)
        finally:
            metrics.leading.set(0)
            try:
                await election.release()
            except KubeError as error:
                _LOG.warning("the lease could not be given up: %s", error)


async def _acquired(election: LeaderElection) -> bool:
    """Wait for the lease; False when a signal came first. As a container's first process nothing else would end it."""
    stop, loop = asyncio.Event(), asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)  # until kopf brings its own
    tasks = [asyncio.create_task(election.acquire()), asyncio.create_task(stop.wait())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return tasks[0].done() and tasks[0].result() is None
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _lead(election: LeaderElection, controller: Controller) -> None:
    """Act for as long as the lease is held; when it is lost, everything else is cancelled first."""
    tasks = {asyncio.create_task(election.hold()), asyncio.create_task(controller.run())}
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def connection_of(config: SingleConfig) -> kopf.ConnectionInfo:
    """kopf's form of the cluster's address and credentials; a pod's rotating token is read anew each time."""
    user, cluster = config.user, config.cluster
    token = user.token if user is not None else None
    token_file = getattr(user, "tokenFile", None) or "/var/run/secrets/kubernetes.io/serviceaccount/token"
    if not token and os.path.exists(token_file):
        with open(token_file, encoding="utf-8") as file:
            token = file.read().strip()
    return kopf.ConnectionInfo(
        server=cluster.server,
        ca_path=cluster.certificate_auth,
        ca_data=cluster.certificate_auth_data,
        insecure=cluster.insecure,
        token=token,
        scheme="Bearer" if token else None,
        username=user.username if user is not None else None,
        password=user.password if user is not None else None,
        certificate_path=user.client_cert if user is not None else None,
        certificate_data=user.client_cert_data if user is not None else None,
        private_key_path=user.client_key if user is not None else None,
        private_key_data=user.client_key_data if user is not None else None,
    )
