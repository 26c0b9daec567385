from typing import Any

import pytest

from antiphon.core.document.composition import CompositionOfExperts, split_model_name
from antiphon.core.document.loading import parse_documents
from antiphon.core.errors import SpecInvalid

GOOD = """
apiVersion: serving.antiphon.dev/v1alpha1
kind: CompositionOfExperts
metadata: {name: team}
spec:
  general: a
  experts:
    - {name: a, deploymentRef: a, memory: 2Gi}
    - {name: b, external: {url: "https://b.example.com/v1/", model: m, apiKeyEnv: KEY}}
"""


def _read(text: str) -> Any:
    (document,) = parse_documents(text.encode(), "coe.yaml")
    return document


def test_a_document_reads_with_defaults() -> None:
    document = _read(GOOD)
    assert isinstance(document, CompositionOfExperts)
    assert document.model_name == "coe/team"
    assert document.spec.policy.name == "balanced"
    assert document.spec.expert("a").memory_bytes == 2 * 2**30
    external = document.spec.expert("b").external
    assert external is not None
    assert external.url == "https://b.example.com/v1"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("general: a", "general: z"), "there is no expert 'z'"),
        (("deploymentRef: a,", ""), "exactly one of deploymentRef and external"),
        (("name: b,", "name: a,"), "used more than once"),
        (("https://b", "ftp://b"), "must start with http"),
        (("general: a", "general: a\n  policy: {name: budget}"), "needs maxAvgActiveParamsB or maxAvgCost"),
        (("general: a", "general: a\n  policy: {name: fancy}"), "policy"),
        (("general: a", "general: a\n  rules: [{name: r, when: {}, expert: b}]"), "at least one of"),
        (("general: a", "general: a\n  rules: [{name: r, when: {value: x, language: de}, expert: b}]"), "needs a header"),
        (("general: a", "general: a\n  fallbacks: [z]"), "fallbacks.0: there is no expert 'z'"),
        (("general: a", "general: a\n  surprise: 1"), "surprise"),
    ],
)
def test_a_wrong_document_is_refused_with_what_is_wrong(change: tuple[str, str], said: str) -> None:
    assert change[0] in GOOD
    with pytest.raises(SpecInvalid) as refused:
        _read(GOOD.replace(*change))
    assert said in str(refused.value)


def test_model_names_split_into_composition_and_policy() -> None:
    assert split_model_name("coe/team") == ("team", None)
    assert split_model_name("coe/team:cheap") == ("team", "cheap")
    assert split_model_name("coe/team:fancy") == ("team:fancy", None)
    assert split_model_name("smollm2") is None
