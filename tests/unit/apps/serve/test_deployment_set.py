"""What several documents ask for together, and what they are refused for."""

import json
from typing import Any

import pytest

from antiphon.apps.serve.deployment_set import Serving, serving_of
from antiphon.core.document.loading import Document, parse_object
from antiphon.core.document.spec import LLMDeployment
from antiphon.core.errors import SpecInvalid

HEAD = {"apiVersion": "serving.antiphon.dev/v1alpha1"}


def llm(name: str, *, model: str | None = None, replicas: int = 1, **spec: Any) -> Document:
    value = {
        **HEAD,
        "kind": "LLMDeployment",
        "metadata": {"name": name},
        "spec": {
            "model": {"uri": "/models/m", **({} if model is None else {"name": model})},
            "pools": [{"name": "monolith", "role": "monolith", "replicas": replicas}],
            **spec,
        },
    }
    return parse_object(value, "test")


def coe(name: str, *references: str) -> Document:
    experts = [{"name": reference, "deploymentRef": reference} for reference in references]
    value = {
        **HEAD,
        "kind": "CompositionOfExperts",
        "metadata": {"name": name},
        "spec": {"experts": experts, "general": references[0]},
    }
    return parse_object(value, "test")


def problems(*documents: Document) -> str:
    with pytest.raises(SpecInvalid) as caught:
        serving_of(documents, "a.yaml")
    return "\n".join(f"{p.source} {p.path} {p.message}" for p in caught.value.problems)


def test_deployments_and_compositions_are_served_together() -> None:
    serving = serving_of([coe("team", "a", "b"), llm("a"), llm("b", model="bee")], "a.yaml")
    assert serving.models == {"a": "a", "b": "bee"}
    assert [c.model_name for c in serving.compositions] == ["coe/team"]
    assert serving.num_workers == 2


def test_deployments_need_no_composition() -> None:
    assert serving_of([llm("a"), llm("b")], "a.yaml").compositions == ()


def test_what_processes_are_told_is_what_was_asked() -> None:
    serving = serving_of([coe("team", "a", "b"), llm("a"), llm("b", endpoint={"httpPort": 0})], "a.yaml")
    assert Serving.from_json(serving.to_json()) == serving
    assert json.loads(serving.to_json())["endpoint"]["httpPort"] == 0


def test_an_expert_without_its_deployment_is_named() -> None:
    assert "a.yaml CompositionOfExperts/team: spec.experts[1].deploymentRef there is no LLMDeployment 'b'" in problems(
        coe("team", "a", "b"), llm("a")
    )


def test_two_deployments_of_one_model_name_are_refused() -> None:
    assert "another LLMDeployment serves 'm' too" in problems(llm("a", model="m"), llm("b", model="m"))


def test_a_pool_without_replicas_is_named() -> None:
    assert "nothing can be served while pool monolith has 0 replicas" in problems(llm("a", replicas=0))


def test_two_documents_may_not_say_different_things_of_the_one_gateway() -> None:
    found = problems(llm("a", endpoint={"httpPort": 1}), llm("b", endpoint={"httpPort": 2, "grpcPort": 3}))
    assert "LLMDeployment/b: spec.endpoint.httpPort one gateway serves all: a says 1, this one 2" in found


def test_what_one_document_says_of_the_gateway_holds_for_all() -> None:
    serving = serving_of([llm("a", endpoint={"httpPort": 1}), llm("b", endpoint={"grpcPort": 3})], "a.yaml")
    assert (serving.endpoint.http_port, serving.endpoint.grpc_port) == (1, 3)


def test_files_with_nothing_to_serve_are_refused() -> None:
    artifact = parse_object({**HEAD, "kind": "ModelArtifact", "metadata": {"name": "w"}, "spec": {"uri": "hf://a/b"}}, "test")
    assert "there are ModelArtifact/w" in problems(artifact)


def drafting(name: str, reference: str, **spec: Any) -> Document:
    return llm(name, speculation={"drafter": "model", "model": {"deploymentRef": reference}}, **spec)


def test_a_deployment_drafts_with_the_checkpoint_of_another() -> None:
    small = llm("small")
    assert isinstance(small, LLMDeployment)
    model = small.spec.model.model_copy(update={"uri": "hf://a/small", "revision": "v1"})
    small = small.model_copy(update={"spec": small.spec.model_copy(update={"model": model})})
    serving = Serving.from_json(serving_of([drafting("large", "small"), small], "a.yaml").to_json())
    speculation = serving.deployments[0].spec.speculation
    assert speculation is not None
    assert speculation.model is not None
    assert (speculation.model.uri, speculation.model.revision) == ("hf://a/small", "v1")


def test_a_draft_model_that_is_not_there_or_writes_no_text_is_refused_with_its_field() -> None:
    field = "LLMDeployment/large: spec.speculation.model.deploymentRef"
    assert f"a.yaml {field} there is no LLMDeployment 'small' in the files; there are large" in problems(drafting("large", "small"))
    small = llm("small")
    assert isinstance(small, LLMDeployment)
    model = small.spec.model.model_copy(update={"task": "embed"})
    small = small.model_copy(update={"spec": small.spec.model_copy(update={"model": model})})
    assert f"{field} LLMDeployment 'small' has the task embed" in problems(drafting("large", "small"), small)
    with pytest.raises(SpecInvalid, match="drafts for itself") as caught:
        drafting("large", "large")
    assert caught.value.problems[0].path == "spec.speculation.model.deploymentRef"
