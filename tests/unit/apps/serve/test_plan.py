"""What a document becomes on Ray Serve, and what its workers are told."""

import dataclasses

import pytest

from antiphon.apps.process.config import CONFIG_VARIABLE, LogSettings, WorkerConfig
from antiphon.apps.process.wiring.sizes import num_ubatches
from antiphon.apps.serve.plan import PoolPlan, PoolTemplate, ServeSettings, cores_of, plan_serve, revision_of
from antiphon.core.document.part import REVISION_ANNOTATION
from antiphon.core.document.spec import LLMDeployment
from antiphon.core.errors import InvalidInput
from antiphon.core.ids import Epoch, FFNShard, Role


def document(**spec: object) -> LLMDeployment:
    base: dict[str, object] = {
        "model": {"uri": "/models/tiny", "name": "tiny"},
        "topology": "afd",
        "pools": [
            {"name": "attention", "role": "attention", "replicas": 2, "resources": {"cpu": "500m"}, "threads": 2},
            {
                "name": "ffn",
                "role": "ffn",
                "replicas": 6,
                "parallelism": {"tensor": 3},
                "cores": [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11],
                "resources": {"cpu": "2", "memory": "4Gi", "gpu": 1},
            },
        ],
    }
    return LLMDeployment.model_validate(
        {
            "apiVersion": "serving.antiphon.dev/v1alpha1",
            "kind": "LLMDeployment",
            "metadata": {"name": "demo"},
            "spec": base | spec,
        }
    )


def template(pool: str = "ffn") -> PoolTemplate:
    return PoolTemplate(
        document=document(), pool=pool, checkpoint="/c", directory="grpc://h:1", host="h", drain_s=3.0, log=LogSettings()
    )


def test_each_pool_becomes_a_deployment_pinned_by_its_resource() -> None:
    plan = plan_serve(document())
    assert [(p.deployment_name, p.num_replicas, p.num_cpus) for p in plan.pools] == [
        ("pool-attention", 2, 0.5),
        ("pool-ffn", 6, 2.0),
    ]
    assert plan.resources == {"pool-attention": 2.0, "pool-ffn": 6.0}
    assert plan.num_workers == 8
    assert plan.num_cpus == pytest.approx(2 * 0.5 + 6 * 2 + 0.1)


def test_a_worker_tells_the_revision_that_its_document_was_given_and_pairs_by_its_own() -> None:
    plain = document()
    named = plain.model_copy(update={"metadata": plain.metadata.model_copy(update={"annotations": {REVISION_ANNOTATION: "abc"}})})
    before, after = (dataclasses.replace(template(), document=d).worker(0, Epoch(1)) for d in (plain, named))
    assert (before.document_revision, after.document_revision) == ("", "abc")
    assert before.revision == after.revision, "peers of both pair: a change in place cuts nobody off"
    assert WorkerConfig.from_json(after.to_json()).document_revision == "abc"


def test_memory_and_accelerators_are_asked_for_on_clusters_only() -> None:
    pool = plan_serve(document()).pools[1]
    assert pool.actor_options(pinned=True, sized=True) == {
        "num_cpus": 2.0,
        "num_gpus": 1,
        "memory": 4 * 2**30,
        "resources": {"pool-ffn": 1},
    }
    assert pool.actor_options(pinned=False, sized=False) == {"num_cpus": 2.0}


def test_a_pool_without_replicas_is_left_out() -> None:
    pools = [{"name": "a", "role": "attention", "replicas": 0}, {"name": "f", "role": "ffn"}]
    assert [p.name for p in plan_serve(document(pools=pools)).pools] == ["f"]


def test_a_worker_is_told_its_part_of_the_document() -> None:
    config = template().worker(4, Epoch(7))
    assert config.worker_id == "demo/ffn/4"
    assert (config.role, config.epoch, config.model) == (Role.FFN, 7, "tiny")
    assert config.shard == FFNShard.of(1, num_tensor=3)
    assert config.threads == 2
    assert config.cores == (8, 9)
    assert config.pool_spec.name == "ffn"


def test_shards_go_round_the_indices() -> None:
    assert [template().worker(i, Epoch(1)).shard.index for i in range(6)] == [0, 1, 2, 0, 1, 2]


def test_threads_come_from_the_document_before_the_cpu_resource() -> None:
    assert template("attention").worker(0, Epoch(1)).threads == 2


def test_processors_are_dealt_out_in_equal_runs() -> None:
    pool = document().spec.pools[1]
    assert [cores_of(pool, i) for i in range(3)] == [(0, 1), (2, 3), (4, 5)]
    assert cores_of(pool, 6) == (0, 1)
    assert cores_of(document().spec.pools[0], 0) == ()


def test_workers_that_list_the_same_processors_are_told_that_they_share_them() -> None:
    pools = [
        {"name": "attention", "role": "attention", "threads": 2, "cores": [0, 1]},
        {"name": "ffn", "role": "ffn", "replicas": 2, "threads": 2, "cores": [1, 0, 2, 3]},
    ]
    shared = document(pools=pools)

    def shares(pool: str, index: int) -> bool:
        whole = PoolTemplate(
            document=shared, pool=pool, checkpoint="/c", directory="grpc://h:1", host="h", drain_s=3.0, log=LogSettings()
        )
        return whole.worker(index, Epoch(1)).shares_cores

    assert [shares("attention", 0), shares("ffn", 0), shares("ffn", 1)] == [True, True, False]
    assert num_ubatches(shared.spec, Role.ATTENTION) == 1  # sides that take turns hide nothing from each other
    assert num_ubatches(document().spec, Role.ATTENTION) > 1
    assert not template().worker(0, Epoch(1)).shares_cores


def test_the_revision_changes_with_what_peers_must_agree_on() -> None:
    base = revision_of(document().spec)
    assert base == revision_of(document().spec)
    assert base != revision_of(document(model={"uri": "/models/other"}).spec)
    assert base != revision_of(document(transport={"activationDtype": "bfloat16"}).spec)
    assert base != revision_of(document(cache={"blockSizeTokens": 32}).spec)


def test_the_revision_does_not_change_with_sizes_names_or_endpoints() -> None:
    base = revision_of(document().spec)
    pools = [
        {"name": "attention", "role": "attention", "replicas": 5},
        {"name": "ffn", "role": "ffn", "replicas": 3, "parallelism": {"tensor": 3}},
    ]
    assert base == revision_of(document(pools=pools).spec)
    assert base == revision_of(document(model={"uri": "/models/tiny", "name": "renamed"}).spec)
    assert base == revision_of(document(endpoint={"httpPort": 1}).spec)


def test_the_revision_changes_with_the_sharding() -> None:
    pools = [{"name": "a", "role": "attention"}, {"name": "f", "role": "ffn", "replicas": 2, "parallelism": {"tensor": 2}}]
    assert revision_of(document(pools=pools).spec) != revision_of(document().spec)


def test_a_configuration_survives_its_journey() -> None:
    config = template().worker(5, Epoch(9))
    assert WorkerConfig.from_json(config.to_json()) == config
    assert WorkerConfig.from_environment({CONFIG_VARIABLE: config.to_json()}) == config


def test_a_configuration_is_read_from_the_file_that_is_named(tmp_path) -> None:
    config = template().worker(0, Epoch(1))
    (tmp_path / "c.json").write_text(config.to_json())
    assert WorkerConfig.from_environment({CONFIG_VARIABLE: str(tmp_path / "c.json")}) == config


@pytest.mark.parametrize("environment", [{}, {CONFIG_VARIABLE: "/nowhere/c.json"}, {CONFIG_VARIABLE: "{}"}, {CONFIG_VARIABLE: "{"}])
def test_a_missing_or_broken_configuration_is_refused(environment: dict[str, str]) -> None:
    with pytest.raises(InvalidInput):
        WorkerConfig.from_environment(environment)


def test_settings_have_no_answers_that_one_machine_must_give() -> None:
    settings = ServeSettings()
    assert (settings.checkpoint, settings.directory, settings.run_dir, settings.host) == (None, None, None, None)


def test_a_plan_is_plain_data() -> None:
    assert PoolPlan(name="a", num_replicas=1, num_cpus=1.0, num_gpus=0, memory_bytes=None).actor_options(
        pinned=False, sized=True
    ) == {"num_cpus": 1.0}
