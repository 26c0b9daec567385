"""A Ray cluster of this machine alone with Ray Serve on it, private to one process: start, deploy, observe, stop (control speed).

Or one that runs already, which is joined and left again. Of its own: no dashboard unless asked, no usage statistics, no files
outside the run directory, no ports beyond loopback, and nothing printed: callers redirect the standard streams while it lives (Ray
writes there from native threads). Must not know: documents.
"""

from __future__ import annotations

import atexit
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

from antiphon.apps.on_ray.control import CONTROL, ControlLost, ControlWatch
from antiphon.apps.on_ray.joining import is_loopback_only
from antiphon.apps.serve.host import check_private, end_descendants, open_private, ray_dir
from antiphon.core.errors import Unavailable

if TYPE_CHECKING:
    from ray.serve import Application

logger = logging.getLogger(__name__)

_OBJECT_STORE_BYTES = 80_000_000  # the smallest that Ray takes; nothing of ours goes through it

_START_ATTEMPTS = 3
_LEFTOVER_GRACE_S = 1.0  # for processes of a failed start
# Ray's own processes end when its control process has been away for so long; requests in flight may take their drain time before.
_CONTROL_AWAY = "RAY_gcs_rpc_server_reconnect_timeout_s"
_CONTROL_AWAY_S = 60

_LOOPBACK = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"

# Read by Ray when it is imported, and by the processes it starts.
_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "token",
    "RAY_DISABLE_IMPORT_WARNING": "1",
    "RAY_DEDUP_LOGS": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_enable_metrics_collection": "0",
    "RAY_SERVE_LOG_TO_STDERR": "0",
    # Ray puts its workers, here the gateway and the supervisors, behind everything else on the machine: where our own workers leave
    # no processor idle, or others do, doors and restarts would wait for it.
    "RAY_worker_niceness": "0",
    # Ray takes the loopback address that it is given for a mistake, and puts the machine's own in its place, but where clusters of
    # several machines are turned off. With it, none of its processes listens beyond this machine.
    _LOOPBACK: "0",
    "RAY_DASHBOARD_STARTUP_TIMEOUT_S": "180",  # a busy machine takes more than Ray's minute; the start's own deadline holds
}


_WHEN_JOINED = ("RAY_DISABLE_IMPORT_WARNING", "RAY_DEDUP_LOGS", "RAY_SERVE_LOG_TO_STDERR")
_TOKEN_FILE = "ray-token"  # noqa: S105 - its name


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


@dataclass(frozen=True, slots=True, kw_only=True)
class RayView:
    """How a person looks at the Ray that serves: its head, its dashboard ("" = none), and variables that its commands need."""

    address: str = ""
    dashboard: str = ""
    variables: str = ""

    def commands(self) -> list[str]:
        """The commands to type."""
        found = [f"{self.variables}ray status --address {self.address}"]
        if self.dashboard:
            found.append(f"{self.variables}serve status --address http://{self.dashboard}")
        return found


class RayRuntime:
    """The cluster; one per process at a time.

    Args:
        run_dir: takes Ray's own files, in a directory of their own.
        num_cpus: processors that Ray may hand out; more than the machine has is fine, Ray only counts.
        resources: custom resources of the node.
        address: of a running cluster to join; None = start one.
        dashboard: start Ray's dashboard with it, on loopback.
        drain_s: how long requests in flight may take after its control process is lost.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        num_cpus: float,
        resources: Mapping[str, float],
        address: str | None = None,
        dashboard: bool = False,
        drain_s: float = 0.0,
    ) -> None:
        self._run_dir = run_dir
        self._num_cpus = math.ceil(num_cpus)
        self._resources = dict(resources)
        self._address = address
        self._dashboard = dashboard
        self._ray: ModuleType | None = None
        self._drain_s = drain_s
        self._control: ControlWatch | None = None
        self._has_begun_serve = False
        self.is_lost = False  # its control process has ended: nothing can be asked of Ray any more
        self.view = RayView()

    @property
    def is_joined(self) -> bool:
        """Whether somebody else started this Ray."""
        return self._address is not None

    def start(self) -> None:
        """Start Ray, as the only thing that this process has started so far; or join it. Raises Unavailable."""
        warnings.filterwarnings("ignore", module="ray")
        if self._address is not None:
            self._join(self._address)
            return
        if "ray" not in sys.modules:  # it has read its environment
            os.environ.update(_ENVIRONMENT)
            os.environ[_CONTROL_AWAY] = str(_CONTROL_AWAY_S + math.ceil(self._drain_s))
            os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)  # of this run only
        import ray

        if self._dashboard:  # its processes leave directories where temporary files lie; the run directory goes at the end
            os.environ["TMPDIR"] = str(ray_dir(self._run_dir))
        self._ray = ray
        others = {process.pid for process in psutil.Process().children()}  # of this run, but none of Ray's
        for attempt in range(_START_ATTEMPTS):
            try:
                context = ray.init(
                    address="local",
                    num_cpus=self._num_cpus,
                    num_gpus=0,
                    resources=self._resources,
                    object_store_memory=_OBJECT_STORE_BYTES,
                    include_dashboard=self._dashboard,
                    dashboard_host="127.0.0.1",
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
                logger.warning("Ray did not start, and is started again: %s", error)
                ray.shutdown()
                end_descendants(_LEFTOVER_GRACE_S, spared=others)
            else:
                check_private(self._run_dir)
                self._look(context, self._keep_token())
                self._control = ControlWatch.of_child(CONTROL)
                return

    def _join(self, address: str) -> None:
        names = [*_WHEN_JOINED, *([_LOOPBACK] if is_loopback_only(address) else [])]
        os.environ.update({name: _ENVIRONMENT[name] for name in names})
        import ray

        try:
            context = ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, namespace="antiphon")
        except Exception as error:
            raise Unavailable(f"can't join Ray at {address}: {error}") from error
        self._ray = ray
        self._look(context, f"{_LOOPBACK}=0 " if _LOOPBACK in names else "")
        self._control = ControlWatch.of_port(self.view.address)

    def check(self) -> None:
        """Raise ControlLost once Ray's control process has ended."""
        if self._control is None:
            return
        try:
            self._control.check()
        except ControlLost:
            self.is_lost = True
            raise

    def _keep_token(self) -> str:
        """Leave the token where ``ray status`` of this user can read it; the variables that say so."""
        path = self._run_dir / _TOKEN_FILE
        with os.fdopen(open_private(path), "w") as file:
            file.write(os.environ.get("RAY_AUTH_TOKEN", ""))
        return f"{_LOOPBACK}=0 RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH={path} "

    def _look(self, context: Any, variables: str) -> None:
        self.view = RayView(
            address=str(context.address_info["gcs_address"]), dashboard=str(context.dashboard_url or ""), variables=variables
        )

    def start_serve(self) -> None:
        """Start Ray Serve without its proxies. Raises Unavailable."""
        from ray import serve
        from ray.serve.config import HTTPOptions, ProxyLocation

        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        if self.is_joined:
            context: Any = importlib.import_module("ray.serve.context")
            if context._get_global_client(raise_if_no_controller_running=False) is not None:
                return  # what else is served there has set it up
        self._has_begun_serve = True
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
        """Stop Ray at once; idempotent. Without its control process it can't be asked to: the host's sweep ends it."""
        if self.is_lost and self._ray is not None:
            atexit.unregister(self._ray.shutdown)
            self._ray = None
        if self._ray is not None:
            ray, self._ray = self._ray, None
            if self.is_joined and self._has_begun_serve:
                with contextlib.suppress(Exception):  # whoever uses Serve there by now keeps it
                    from ray import serve

                    if not serve.status().applications:
                        serve.shutdown()  # type: ignore[no-untyped-call]
            with contextlib.suppress(Exception):  # whatever is left is ended by the host's sweep
                ray.shutdown()
