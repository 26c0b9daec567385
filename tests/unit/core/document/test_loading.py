"""Reading documents: what is wrong is named with its path and line, all of it at once, and nothing else ever escapes."""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from antiphon.core.document.loading import KINDS, parse_documents, parse_object, read_documents
from antiphon.core.document.spec import LLMDeployment, Topology
from antiphon.core.document.yaml import load_yaml
from antiphon.core.errors import Problem, SpecInvalid

GOOD = """\
apiVersion: serving.antiphon.dev/v1alpha1
kind: LLMDeployment
metadata:
  name: demo
  labels: {team: "7"}
spec:
  model: {uri: /models/demo, maxModelLen: 2048}
  topology: pd-afd
  pools:
    - {name: prefill, role: prefill}
    - {name: attention, role: attention, replicas: 2, cores: [0, 1]}
    - name: ffn
      role: ffn
      replicas: 4
      parallelism: {tensor: 2}
      resources: {cpu: 500m, memory: 2Gi}
  transport: {activations: grpc, numUbatches: auto, peerTimeoutS: 3}
  scheduler: {maxNumSeqs: 8}
  cache: {numBlocks: 64, prefixCaching: false}
"""


def problems_of(text: str | bytes) -> dict[str, str]:
    with pytest.raises(SpecInvalid) as caught:
        parse_documents(text, "test.yaml")
    return {problem.path: problem.message for problem in caught.value.problems}


def changed(old: str, new: str) -> str:
    assert old in GOOD
    return GOOD.replace(old, new)


def test_a_good_document_becomes_its_typed_model() -> None:
    (document,) = parse_documents(GOOD, "test.yaml")
    assert isinstance(document, LLMDeployment)
    assert document.spec.topology is Topology.PD_AFD
    assert [pool.replicas for pool in document.spec.pools] == [1, 2, 4]
    assert document.spec.transport.peer_timeout_s == 3.0
    assert document.model_name == "demo"


def test_several_documents_stand_in_one_file(tmp_path: Path) -> None:
    path = tmp_path / "two.yaml"
    path.write_text("---\n" + GOOD + "---\n---\n" + changed("name: demo", "name: other"))
    assert [document.metadata.name for document in read_documents(path)] == ["demo", "other"]


def test_what_a_cluster_adds_to_a_document_is_no_obstacle() -> None:
    exported = changed("  name: demo", "  name: demo\n  uid: 1234\n  resourceVersion: '7'") + "status: {phase: Ready}\n"
    assert parse_documents(exported, "test.yaml")


def test_a_plain_value_is_checked_like_a_file() -> None:
    value = yaml.safe_load(GOOD)
    assert isinstance(parse_object(value, "cluster"), LLMDeployment)
    value["spec"]["pools"][1]["replicas"] = "2"
    with pytest.raises(SpecInvalid) as caught:
        parse_object(value, "cluster")
    (problem,) = caught.value.problems
    assert (problem.path, problem.source, problem.line) == ("spec.pools[1].replicas", "cluster", None)


@pytest.mark.parametrize(
    ("old", "new", "path", "message"),
    [
        ("replicas: 4", "replicas: four", "spec.pools[2].replicas", "expected an integer, got the string 'four'"),
        ("replicas: 4", 'replicas: "4"', "spec.pools[2].replicas", "expected an integer, got the string '4'"),
        ("replicas: 4", "replicas: -4", "spec.pools[2].replicas", "expected a number >= 0, got -4"),
        ("replicas: 4", "replicas:", "spec.pools[2].replicas", "expected an integer, got nothing (null)"),
        ("replicas: 4", "replica: 4", "spec.pools[2].replica", "unknown key; did you mean replicas?"),
        ("cores: [0, 1]", "cores: [0, x]", "spec.pools[1].cores[1]", "expected an integer, got the string 'x'"),
        ("cores: [0, 1]", "cores: {}", "spec.pools[1].cores", "expected a list, got a mapping"),
        ("maxModelLen", "max_model_len", "spec.model.max_model_len", "unknown key; did you mean maxModelLen?"),
        ("numUbatches: auto", "numUbatches: x", "spec.transport.numUbatches", "expected an integer or 'auto', got the string 'x'"),
        ("numUbatches: auto", "numUbatches: 9", "spec.transport.numUbatches", "must be 'auto' or between 1 and 8; got 9"),
        ("peerTimeoutS: 3", "peerTimeoutS: true", "spec.transport.peerTimeoutS", "expected a number, got true"),
        ("peerTimeoutS: 3", "peerTimeoutS: .nan", "spec.transport.peerTimeoutS", "expected a number <= 600, got nan"),
        ("prefixCaching: false", 'prefixCaching: "no"', "spec.cache.prefixCaching", "expected true or false, got the string 'no'"),
        ("  cache: {numBlocks: 64, prefixCaching: false}", "  cache: [1]", "spec.cache", "expected a mapping, got a list of 1"),
        ('{team: "7"}', "{team: 7}", "metadata.labels.team", "expected a string, got 7"),
    ],
)  # fmt: skip
def test_a_wrong_field_is_named_with_what_was_expected_and_what_stands_there(old: str, new: str, path: str, message: str) -> None:
    assert problems_of(changed(old, new)) == {path: message}


def test_a_misspelt_choice_gets_a_suggestion() -> None:
    found = problems_of(changed("role: ffn", "role: fnn"))
    assert found["spec.pools[2].role"].endswith("got the string 'fnn'; did you mean ffn?")


def test_an_unknown_key_without_a_near_name_is_told_all_names() -> None:
    found = problems_of(changed("  scheduler: {maxNumSeqs: 8}", "  directory: {zzz: 8}"))
    assert found == {"spec.directory.zzz": "unknown key; known: leaseS, redisUrl"}


def test_a_missing_field_says_what_it_is_for() -> None:
    found = problems_of(changed("uri: /models/demo, ", ""))
    assert found["spec.model.uri"].startswith("required, but missing: Where the checkpoint is")


def test_bounds_that_a_scaling_mode_needs_are_reported_where_they_are_missing() -> None:
    found = problems_of(changed("replicas: 4", "replicas: 4\n      scaling: {mode: SLO, maxReplicas: 4}"))
    assert found == {"spec.pools[2].scaling.minReplicas": "mode SLO needs it"}


def test_a_missing_pool_is_reported_at_the_pools() -> None:
    text = GOOD.replace("    - {name: prefill, role: prefill}\n", "")
    assert problems_of(text) == {"spec.pools": "topology pd-afd needs a pool with role prefill"}


def test_a_pool_that_the_topology_has_not_is_reported_at_its_role() -> None:
    found = problems_of(changed("topology: pd-afd", "topology: afd"))
    assert found == {"spec.pools[0].role": "topology afd has no role prefill; expected attention, ffn"}


def test_replicas_that_do_not_fit_their_shards_are_reported_at_the_replicas() -> None:
    found = problems_of(changed("replicas: 4", "replicas: 3"))
    assert found.keys() == {"spec.pools[2].replicas"}
    assert found["spec.pools[2].replicas"].startswith("3 is not a multiple of the 2 shards")


def test_a_name_used_twice_is_reported_at_the_second() -> None:
    found = problems_of(changed("name: attention", "name: prefill"))
    assert found == {"spec.pools[1].name": "the name 'prefill' is used more than once"}


def test_all_problems_are_named_at_once_with_their_lines() -> None:
    text = changed("replicas: 4", "replicas: x").replace("maxNumSeqs", "maxSeqs").replace("/models/demo", "7") + "---\nkind: Pod\n"
    with pytest.raises(SpecInvalid) as caught:
        parse_documents(text, "test.yaml")
    assert [(problem.line, problem.path) for problem in caught.value.problems] == [
        (7, "spec.model.uri"),
        (14, "spec.pools[2].replicas"),
        (18, "spec.scheduler.maxSeqs"),
        (21, "apiVersion"),
        (21, "kind"),
    ]
    assert {problem.source for problem in caught.value.problems} == {"test.yaml"}


def test_an_unknown_kind_is_told_the_known_ones() -> None:
    found = problems_of(changed("kind: LLMDeployment", "kind: LLMdeploymnt"))
    assert found["kind"].startswith(f"expected one of {', '.join(KINDS)}, got the string 'LLMdeploymnt'")
    assert found["kind"].endswith("did you mean LLMDeployment?")


def test_a_wrong_api_version_is_reported_beside_wrong_fields() -> None:
    found = problems_of(changed("v1alpha1", "v9").replace("replicas: 4", "replicas: x"))
    assert found.keys() == {"apiVersion", "spec.pools[2].replicas"}
    assert found["apiVersion"] == "expected serving.antiphon.dev/v1alpha1, got the string 'serving.antiphon.dev/v9'"


def test_a_document_that_is_no_mapping_is_refused() -> None:
    assert "got a list of 2" in problems_of("[1, 2]")["document"]


def test_a_key_given_twice_is_refused_with_both_lines() -> None:
    found = problems_of(changed("  topology: pd-afd", "  topology: pd-afd\n  topology: afd"))
    assert found == {"spec.topology": "line 9: the key is there already, in line 8"}


def test_a_key_that_is_no_string_is_refused_with_its_line() -> None:
    assert problems_of(changed('{team: "7"}', "{on: a}")) == {"metadata.labels": "line 5: 'on' is not a string: put keys in quotes"}


def test_broken_yaml_is_refused_with_line_and_column() -> None:
    message = problems_of(changed("topology: pd-afd", "topology: [pd"))["document"]
    assert message.startswith("line 9, column 8: not YAML: ")


def test_tags_are_refused() -> None:
    assert "is not allowed" in problems_of("a: !!python/object:os.system {}\n")["a"]


def test_dates_stay_text() -> None:
    (document,) = parse_documents(changed('"7"', "2026-01-02"), "test.yaml")
    assert document.metadata.labels == {"team": "2026-01-02"}


# Text of a plain word and what sigs.k8s.io/yaml v1.6 makes of it, by the rules of its resolve.go.
PLAIN_WORDS: list[tuple[str, object]] = [
    ("1:30", "1:30"),
    ("190:20:30.15", "190:20:30.15"),
    ("y", True),
    ("Y", True),
    ("n", False),
    ("on", True),
    ("OFF", False),
    ("oN", "oN"),
    ("yes", True),
    ("1e3", 1000.0),
    ("1E+2", 100.0),
    (".5e1", 5.0),
    ("1.", 1.0),
    ("010", 8),
    ("0o10", 8),
    ("08", 8.0),
    ("0x1F", 31),
    ("-0b11", -3),
    ("1_000", 1000),
    ("1_0.5", 10.5),
    ("_1", "_1"),
    ("1e999", "1e999"),
    ("0o", "0o"),
    ("+", "+"),
    ("=", "="),
    ("<<", "<<"),
    ("~", None),
    ("2026-01-02", "2026-01-02"),
    ("2026-01-02 03:04:05", "2026-01-02 03:04:05"),
    ("12e03", 12000.0),
    ("\uff11", "\uff11"),
]


@pytest.mark.parametrize(("text", "expected"), PLAIN_WORDS)
def test_plain_words_are_what_kubernetes_reads(text: str, expected: object) -> None:
    (document,) = load_yaml(f"a: {text}\nb: '{text}'\nc: [{text}]\n", "test.yaml")
    assert isinstance(document.value, dict)
    assert (document.value["a"], type(document.value["a"])) == (expected, type(expected))
    assert document.value["b"] == text
    assert document.value["c"] == [expected]


def test_minutes_and_seconds_are_no_number_of_replicas() -> None:
    found = problems_of(changed("replicas: 4", "replicas: 1:30"))
    assert found == {"spec.pools[2].replicas": "expected an integer, got the string '1:30'"}


def test_a_key_that_kubernetes_takes_for_a_boolean_needs_quotes() -> None:
    assert "put keys in quotes" in problems_of(changed('{team: "7"}', "{y: a}"))["metadata.labels"]


def test_merge_keys_are_refused_by_name() -> None:
    found = problems_of(changed('{team: "7"}', '{<<: {team: "7"}}'))
    assert found == {"metadata.labels": "line 5: merge keys (<<) are not taken: write the fields out here"}


@pytest.mark.parametrize("name", ["abc\\n", "gateway\\n", "headgroup\\n"])
def test_a_name_that_ends_in_a_line_end_is_refused(name: str) -> None:
    assert "must be a DNS label" in problems_of(changed("name: demo", f'name: "{name}"'))["metadata.name"]
    pool = changed("- name: ffn", f'- name: "{name}"')
    assert "must be a DNS label" in problems_of(pool)["spec.pools[2].name"]


def test_aliases_work_but_do_not_unfold_into_a_memory_full() -> None:
    assert parse_documents(changed("{team", "&l {team").replace("spec:", "  annotations: *l\nspec:"), "t")
    bomb = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n"
    bomb += "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 12))
    assert problems_of(bomb) == {"document": "nested too deeply"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"\xff\xfe\x00", "not UTF-8"),
        ("a: \x00", "not YAML"),
        ("", "no document"),
        ("# only a comment\n", "no document"),
        ("[" * 5000, "nested too deeply"),
        ("a: &a [*a]", "nested too deeply"),
        ("x" * (5 * 2**20), "longer than"),
    ],
)
def test_what_is_no_document_at_all_is_refused_in_words(text: str | bytes, message: str) -> None:
    assert message in problems_of(text)["document"]


def test_a_number_with_thousands_of_digits_is_refused() -> None:
    assert "spec.pools[2].replicas" in problems_of(changed("replicas: 4", "replicas: " + "9" * 6000))


def test_a_file_that_is_not_there_is_a_problem_like_others(tmp_path: Path) -> None:
    with pytest.raises(SpecInvalid, match="can't be read: No such file"):
        read_documents(tmp_path / "none.yaml")
    with pytest.raises(SpecInvalid, match="can't be read: Is a directory"):
        read_documents(tmp_path)


def test_the_same_deployment_twice_in_a_file_is_refused() -> None:
    assert problems_of(GOOD + "---\n" + GOOD) == {"metadata.name": "LLMDeployment/demo is in the file twice"}


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


def _paths(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path] + [deeper for key, child in children for deeper in _paths(child, (*path, key))]


def _problems(parse: Callable[[], object]) -> tuple[Problem, ...]:
    """What is wrong, if anything; whatever is raised besides SpecInvalid fails the test."""
    try:
        parse()
    except SpecInvalid as error:
        return error.problems or (Problem(path="", message=""),)
    return ()


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_no_mutation_of_a_good_document_raises_anything_else(data: st.DataObject) -> None:
    value = copy.deepcopy(yaml.safe_load(GOOD))
    for _ in range(data.draw(st.integers(1, 3))):
        path = data.draw(st.sampled_from([path for path in _paths(value) if path]))
        parent = value
        for part in path[:-1]:
            parent = parent[part]
        match data.draw(st.sampled_from(["replace", "delete", "rename"])):
            case "replace":
                parent[path[-1]] = data.draw(JSON)
            case "delete":
                del parent[path[-1]]
            case "rename" if isinstance(parent, dict):
                parent[data.draw(st.text(max_size=8))] = parent.pop(path[-1])
        if not any(path for path in _paths(value)):
            break
    for problem in _problems(lambda: parse_object(value, "test")):
        assert problem.path
        assert 0 < len(problem.message) < 1500
    _problems(lambda: parse_documents(json.dumps(value), "test"))


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=200) | st.binary(max_size=200), st.integers(0, len(GOOD)), st.integers(0, 30))
def test_no_text_at_all_raises_anything_else(noise: str | bytes, start: int, length: int) -> None:
    middle = noise.encode("utf-8", "replace") if isinstance(noise, str) else noise
    for text in (middle, GOOD[:start].encode() + middle + GOOD[start + length :].encode()):
        _problems(functools.partial(parse_documents, text, "test"))  # raises whatever is not SpecInvalid


@pytest.mark.parametrize("text", ['{"k\\ud83d\\ude00": "\\ud83d\\ude00"}', json.dumps({"k😀": "😀"}), 'k😀: "\\U0001F600"'])
def test_a_character_may_stand_in_the_two_halves_that_json_writes(text: str) -> None:
    (document,) = load_yaml(text, "t")
    assert document.value == {"k😀": "😀"}


@pytest.mark.parametrize("text", ['{"k": "\\ud83d"}', '{"k": "\\ude00\\ud83d"}', '{"\\ud83d": 1}'])
def test_half_a_character_is_refused(text: str) -> None:
    with pytest.raises(SpecInvalid, match="line 1"):
        load_yaml(text, "t")
