"""The deployment document's own arithmetic and the topologies it allows."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from antiphon.core.document.pools import PoolSpec, parse_quantity
from antiphon.core.document.spec import API_VERSION, ROLES_OF, LLMDeployment, Topology
from antiphon.core.ids import Role


def deployment(topology: str, *pools: dict[str, Any], **spec: Any) -> LLMDeployment:
    return LLMDeployment.model_validate(
        {
            "apiVersion": API_VERSION,
            "kind": "LLMDeployment",
            "metadata": {"name": "demo"},
            "spec": {"model": {"uri": "x"}, "topology": topology, "pools": list(pools), **spec},
        }
    )


def pool(role: str, **fields: Any) -> dict[str, Any]:
    return {"name": fields.pop("name", role), "role": role, **fields}


@pytest.mark.parametrize("topology", list(Topology))
def test_each_topology_takes_exactly_its_roles(topology: Topology) -> None:
    pools = [pool(role.value) for role in ROLES_OF[topology]]
    found = deployment(topology.value, *pools)
    assert [p.worker_role for p in found.spec.pools] == list(ROLES_OF[topology])
    with pytest.raises(ValidationError):
        deployment(topology.value, *pools[1:], pool("monolith" if topology is not Topology.MONOLITH else "ffn", name="odd"))


@pytest.mark.parametrize(("attention", "ffn", "tensor"), [(1, 1, 1), (2, 1, 1), (1, 2, 2), (2, 3, 3), (1, 4, 2), (4, 6, 3)])
def test_any_number_of_attention_workers_meets_any_number_of_ffn_workers(attention: int, ffn: int, tensor: int) -> None:
    found = deployment("afd", pool("attention", replicas=attention), pool("ffn", replicas=ffn, parallelism={"tensor": tensor}))
    assert [p.replicas for p in found.spec.pools] == [attention, ffn]


def test_several_pools_may_have_one_role() -> None:
    found = deployment("monolith", pool("monolith", name="big"), pool("monolith", name="small"))
    assert [p.name for p in found.spec.pools] == ["big", "small"]


@pytest.mark.parametrize(
    ("text", "value"), [("1", 1.0), ("500m", 0.5), ("2Gi", 2 * 2**30), ("1.5M", 1.5e6), ("4k", 4000.0), ("0", 0.0)]
)
def test_quantities_are_those_of_kubernetes(text: str, value: float) -> None:
    assert parse_quantity(text) == pytest.approx(value)


@pytest.mark.parametrize("text", ["", "-1", "1 Gi", "1GiB", "one", "1e3", "٣"])
def test_what_is_no_quantity_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        parse_quantity(text)


@pytest.mark.parametrize(("cpu", "threads", "expected"), [("1", None, 1), ("4", None, 4), ("500m", None, 1), ("2", 8, 8)])
def test_threads_come_from_the_processors_unless_given(cpu: str, threads: int | None, expected: int) -> None:
    found = PoolSpec.model_validate({"name": "a", "role": "ffn", "threads": threads, "resources": {"cpu": cpu}})
    assert found.num_threads == expected


def test_clients_send_the_models_name_or_else_the_deployments() -> None:
    named = deployment("monolith", pool("monolith"), model={"uri": "x", "name": "org/model"})
    assert (deployment("monolith", pool("monolith")).model_name, named.model_name) == ("demo", "org/model")


def test_a_document_survives_its_own_wire_form() -> None:
    first = deployment("afd", pool("attention", cores=[0]), pool("ffn", replicas=2, parallelism={"tensor": 2}))
    assert LLMDeployment.model_validate(first.model_dump(by_alias=True, mode="json")) == first


def test_roles_say_what_they_hold() -> None:
    assert [role.value for role in Role if role.holds_ffn and role.holds_attention] == ["monolith", "prefill", "decode"]
    assert [role.value for role in Role if role.generates] == ["monolith", "decode", "attention"]
