"""A Ray cluster that runs already, as ``antiphon serve`` joins it: what it must offer, what its processes get (control speed).

Whatever is served there stays on this machine's node: run directory, directory of workers and checkpoints are this machine's files
and ports. Must not know: documents.
"""

from __future__ import annotations

import importlib
import ipaddress
import json
import os
import socket
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from antiphon.apps.serve.host import open_private
from antiphon.core.errors import InvalidInput, Unavailable

ADDRESS_VARIABLE = "RAY_ADDRESS"
_FIELD = "--ray-address"
_ENVIRONMENT_VARIABLE = "ANTIPHON_SERVE_ENVIRONMENT"  # names the file
_ENVIRONMENT_FILE = "environment.json"
_CONNECT_S = 1.5
_ELSEWHERE = "192.0.2.1"  # an address of documentation: nobody's
_NODE_SHARE = 0.001  # of the resource that stands for a node: enough to be put there


def address_from(option: str | None, environment: Mapping[str, str] = os.environ) -> str | None:
    """The cluster to join: the option, or Ray's own variable; None = start one.

    Raises:
        InvalidInput: it is not the address of a cluster's head, or nothing listens there.
    """
    field = _FIELD if option is not None else ADDRESS_VARIABLE
    address = option if option is not None else environment.get(ADDRESS_VARIABLE)
    if address is None or address in ("", "local"):
        return None
    if address == "auto":
        return address
    host, _, port = address.rpartition(":")
    if "://" in address:
        raise InvalidInput(f"{field}: {address} is Ray's client protocol; name the head instead, as 127.0.0.1:6379 or auto", field)
    if not host or not port.isdecimal() or not 0 < int(port) < 65_536:
        raise InvalidInput(f"{field}: {address!r} is no address of a Ray head; as 127.0.0.1:6379, or auto", field)
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_S).close()
    except OSError as error:
        raise InvalidInput(f"{field}: no Ray at {address} ({error}); is `ray start --head` running?", field) from error
    return address


def is_loopback_only(address: str) -> bool:
    """Whether the head at ``address`` listens on loopback alone: Ray, which takes loopback for a mistake, then has to be told."""
    host, _, port = address.rpartition(":")
    try:
        if not ipaddress.ip_address(host.strip("[]")).is_loopback:
            return False
    except ValueError:
        if host != "localhost":
            return False
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((_ELSEWHERE, 1))  # sends nothing: it only asks which of this machine's addresses leads out
            own = probe.getsockname()[0]
        socket.create_connection((own, int(port)), timeout=_CONNECT_S).close()
    except OSError:
        return True
    return False


@dataclass(frozen=True, slots=True, kw_only=True)
class JoinedNode:
    """This machine's node of the joined cluster."""

    address: str  # of the node, without a port
    num_other_nodes: int
    num_free_cpus: float

    def warnings(self) -> list[str]:
        """What does not hold here as it does on a Ray of this process' own."""
        found = []
        if self.num_other_nodes:
            found.append(
                f"everything runs on this machine ({self.address}); {self.num_other_nodes} other node(s) of this Ray are not used: "
                "pools over several machines are the operator's"
            )
        if not ipaddress.ip_address(self.address).is_loopback:
            found.append(f"Ray Serve's own ports listen on {self.address} and beyond, open to whoever reaches them")
        found.append("when this Ray's head ends or restarts, what is served ends with it: run this command again")
        return found


def look_at_node(num_cpus: float) -> JoinedNode:
    """This machine's node, once this process is a driver of the cluster.

    Args:
        num_cpus: that replicas will reserve.

    Raises:
        Unavailable: another user's Ray, or too few processors are free.
    """
    import ray

    worker: Any = importlib.import_module("ray._private.worker")  # modules of Ray's own, without types
    state: Any = importlib.import_module("ray._private.state")
    node = worker.global_worker.node
    owner = Path(node.get_session_dir_path()).stat().st_uid
    if owner != os.geteuid():
        raise Unavailable(
            f"this Ray runs as user {owner}, this command as {os.geteuid()}: its processes can't enter the run directory"
        )
    nodes = [one for one in ray.nodes() if one["Alive"]]  # type: ignore[no-untyped-call]
    mine = str(ray.get_runtime_context().get_node_id())
    free = float(state.available_resources_per_node().get(mine, {}).get("CPU", 0.0))
    if free < num_cpus:
        raise Unavailable(
            f"this Ray has {free:g} processors free on this machine, the document's pools ask for {num_cpus:g}: "
            "`ray start --num-cpus`, or less in spec.pools[].resources.cpu (Ray only counts them)"
        )
    return JoinedNode(address=node.node_ip_address, num_other_nodes=len(nodes) - 1, num_free_cpus=free)


def options_for(node: JoinedNode, run_dir: Path) -> dict[str, Any]:
    """Ray actor options of every replica: on this node, with this Python and, by a private file, this environment."""
    path = run_dir / _ENVIRONMENT_FILE
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    with os.fdopen(open_private(path), "w") as file:
        json.dump(environment, file)
    variables = {_ENVIRONMENT_VARIABLE: str(path), "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    return {
        "resources": {f"node:{node.address}": _NODE_SHARE},
        "runtime_env": {"env_vars": variables, "py_executable": sys.executable},
    }


def take_environment() -> None:
    """Give this Serve replica the environment of the command that serves it, where that joined a cluster.

    Raises:
        Unavailable: the command is gone; its application is deleted.
    """
    path = os.environ.get(_ENVIRONMENT_VARIABLE)
    if path is None:
        return
    try:
        environment = json.loads(Path(path).read_bytes())
    except (OSError, ValueError) as error:
        from ray import serve

        serve.delete(serve.get_replica_context().app_name, _blocking=False)
        raise Unavailable(f"the command that serves this is gone: {error}") from error
    os.environ.update(environment)
