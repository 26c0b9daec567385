"""A Ray cluster of this machine alone with Ray Serve on it, private to one process: start, deploy, observe, stop (control speed).

No dashboard, no usage statistics, no files outside the run directory, no ports beyond loopback, and nothing printed: callers
redirect the standard streams while it lives (Ray writes there from native threads). Must not know: documents.
"""

from __future__ import annotations

import contextlib
import importlib
import ipaddress
import logging
import math
import os
import secrets
import sys
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import psutil

from antiphon.apps.serve.host import check_private, end_descendants, ray_dir
from antiphon.core.errors import Unavailable

if TYPE_CHECKING:
    from ray.serve import Application

_OBJECT_STORE_BYTES = 80_000_000  # the smallest that Ray takes; nothing of ours goes through it

_START_ATTEMPTS = 2
_LEFTOVER_GRACE_S = 1.0  # for processes of a failed start

# Read by Ray when it is imported, and by the processes it starts.
_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "token",
    "RAY_DISABLE_IMPORT_WARNING": "1",
    "RAY_DEDUP_LOGS": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_enable_metrics_collection": "0",
    "RAY_SERVE_LOG_TO_STDERR": "0",
    # Ray takes the loopback address that it is given for a mistake, and puts the machine's own in its place, but where clusters of
    # several machines are turned off. With it, none of its processes listens beyond this machine.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
}


def keep_serve_on_loopback() -> None:
    """Let this Serve replica's own server listen on loopback only, where Ray does. Called before its constructor returns.

    Serve opens a port for calls between deployments on every address of the machine, unauthenticated, and unpickles what it gets.
    """
    import ray

    replica: Any = importlib.import_module("ray.serve._private.replica")  # a module of Ray's own, without types
    util: Any = ray.util
    if not ipaddress.ip_address(util.get_node_ip_address()).is_loopback:
        return  # a cluster: who reaches its ports is the network policy's matter
    bind = replica.add_port_to_grpc_server
    replica.add_port_to_grpc_server = lambda server, address: bind(server, address.replace("[::]", "127.0.0.1"))


@dataclass(frozen=True, slots=True, kw_only=True)
class ApplicationState:
    """A Serve application as Serve sees it; ``deployments`` has the message of each unhealthy one."""

    status: str  # NOT_STARTED, DEPLOYING, RUNNING, DEPLOY_FAILED, UNHEALTHY, DELETING
    message: str = ""
    deployments: Mapping[str, str] = field(default_factory=dict)

    @property
    def running(self) -> bool:
        """Every deployment has all its replicas."""
        return self.status == "RUNNING"

    @property
    def failed(self) -> bool:
        """It will not get running by itself."""
        return self.status == "DEPLOY_FAILED"


class RayRuntime:
    """The cluster; one per process at a time.

    Args:
        run_dir: takes Ray's own files, in a directory of their own.
        num_cpus: processors that Ray may hand out; more than the machine has is fine, Ray only counts.
        resources: custom resources of the node.
    """

    def __init__(self, run_dir: Path, *, num_cpus: float, resources: Mapping[str, float]) -> None:
        self._run_dir = run_dir
        self._num_cpus = math.ceil(num_cpus)
        self._resources = dict(resources)
        self._ray: ModuleType | None = None

    def start(self) -> None:
        """Start Ray, as the only thing that this process has started so far. Raises Unavailable."""
        if "ray" not in sys.modules:  # it has read its environment
            os.environ.update(_ENVIRONMENT)
            os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)  # of this run only, and in no file
        warnings.filterwarnings("ignore", module="ray")
        import ray

        self._ray = ray
        others = {process.pid for process in psutil.Process().children()}  # of this run, but none of Ray's
        for attempt in range(_START_ATTEMPTS):
            try:
                ray.init(
                    num_cpus=self._num_cpus,
                    num_gpus=0,
                    resources=self._resources,
                    object_store_memory=_OBJECT_STORE_BYTES,
                    include_dashboard=False,
                    log_to_driver=False,
                    logging_level=logging.ERROR,
                    namespace="antiphon",
                    _temp_dir=str(ray_dir(self._run_dir)),
                    _node_ip_address="127.0.0.1",
                )
            except Exception as error:
                # On a machine that is busy beyond measure Ray's processes may miss each other's deadlines.
                if attempt + 1 == _START_ATTEMPTS:
                    raise Unavailable(f"Ray did not start: {error}") from error
                ray.shutdown()
                end_descendants(_LEFTOVER_GRACE_S, spared=others)
            else:
                check_private(self._run_dir)
                return

    def start_serve(self) -> None:
        """Start Ray Serve without its proxies. Raises Unavailable."""
        from ray import serve
        from ray.serve.config import HTTPOptions, ProxyLocation

        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        try:
            serve.start(http_options=HTTPOptions(location=ProxyLocation.Disabled))
        except Exception as error:
            raise Unavailable(f"Ray Serve did not start: {error}") from error

    def deploy(self, name: str, application: Application) -> None:
        """Deploy, without waiting for it. Raises Unavailable."""
        from ray import serve
        from ray.serve.api import RunTarget

        try:
            serve.run_many(
                [RunTarget(target=application, name=name, route_prefix=None)],
                wait_for_ingress_deployment_creation=False,
                wait_for_applications_running=False,
            )
        except Exception as error:
            raise Unavailable(f"Ray Serve refused {name}: {error}") from error

    def state(self, name: str) -> ApplicationState:
        """How the application stands. Raises Unavailable."""
        from ray import serve

        try:
            overview = serve.status().applications.get(name)
        except Exception as error:
            raise Unavailable(f"Ray Serve does not answer: {error}") from error
        if overview is None:
            return ApplicationState(status="NOT_STARTED")
        return ApplicationState(
            status=str(overview.status.value),
            message=overview.message,
            deployments={key: value.message for key, value in overview.deployments.items() if value.message},
        )

    def delete(self, name: str) -> None:
        """Delete the application; its replicas drain first. Blocks until they are gone. Raises Unavailable."""
        from ray import serve

        try:
            serve.delete(name)
        except Exception as error:
            raise Unavailable(f"Ray Serve could not delete {name}: {error}") from error

    def stop(self) -> None:
        """Stop Ray at once; idempotent."""
        if self._ray is not None:
            ray, self._ray = self._ray, None
            with contextlib.suppress(Exception):  # whatever is left is ended by the host's sweep
                ray.shutdown()
