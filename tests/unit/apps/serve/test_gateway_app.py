"""A gateway that Ray Serve has started again is found where it was, and the console says where that is."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from antiphon.apps.serve.gateway_app import at_former_ports, port_facts
from antiphon.apps.serve.plan import GATEWAY
from antiphon.apps.supervision.event_log import EventLog
from antiphon.cli.serving.serve_view import later_line
from antiphon.gateway.config import BoundPorts, GatewayConfig

ANY = GatewayConfig(models={"m": Path("/m")}, http_port=0, grpc_port=0)


def test_a_gateway_that_took_any_ports_takes_the_same_ones_again(tmp_path: Path) -> None:
    log = EventLog(tmp_path)
    assert at_former_ports(ANY, log.read()) == ANY
    for http_port in (41_001, 41_003):
        bound = BoundPorts(host="127.0.0.1", http_port=http_port, grpc_port=http_port + 1)
        log.write("ready", GATEWAY, pid=1, facts=port_facts(bound))
    again = at_former_ports(ANY, log.read())
    assert (again.http_port, again.grpc_port) == (41_003, 41_004)
    fixed = replace(ANY, http_port=8000)
    assert at_former_ports(fixed, log.read()).http_port == 8000
    several = replace(ANY, reuse_port=True)
    assert at_former_ports(several, log.read()) == several, "another of them may be there"
    assert later_line(log.read()[-1]) == "gateway (pid 1) is ready at 127.0.0.1, HTTP port 41003, gRPC port 41004"
