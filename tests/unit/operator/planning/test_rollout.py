"""Rollouts: exact step sequences, and the budget at every step."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from antiphon.core.document.policies import RolloutStrategy
from antiphon_operator.planning.rollout import Action, RevisionRef, World, next_step, preview

OLD = RevisionRef(name="old", cluster="c1", num_gpus=4)
NEW = RevisionRef(name="new", cluster="c2", num_gpus=4)
SERVE_ONLY = RevisionRef(name="new", cluster="c1", num_gpus=4)
RUNNING = World(wanted=OLD, applied=OLD, last_good=OLD, ready=True, num_clusters=1, gpus_held=4)


def steps(world: World) -> list[str]:
    return [f"{line.action.value} {line.revision} {line.num_gpus}" for line in preview(world)]


def test_a_first_start_creates_and_waits() -> None:
    assert steps(World(wanted=NEW, applied=None)) == ["Create new 4", "Wait new 4", "Nothing new 4"]


def test_a_surge_runs_both_clusters_then_only_the_new_one() -> None:
    assert steps(replace(RUNNING, wanted=NEW)) == ["ApplyCluster new 8", "Wait new 8", "Wait new 4", "Nothing new 4"]


def test_a_surge_that_does_not_fit_the_budget_becomes_recreate() -> None:
    expected = ["Suspend old 4", "Wait new 0", "Resume new 4", "Wait new 4", "Nothing new 4"]
    assert steps(replace(RUNNING, wanted=NEW, gpu_budget=7)) == expected
    assert steps(replace(RUNNING, wanted=NEW, strategy=RolloutStrategy.RECREATE)) == expected


def test_a_change_within_serve_touches_no_cluster() -> None:
    assert steps(replace(RUNNING, wanted=SERVE_ONLY)) == ["ApplyServe new 4", "Wait new 4", "Nothing new 4"]


def test_what_serves_is_left_alone_until_the_wanted_revisions_weights_are_there() -> None:
    for wanted in (NEW, SERVE_ONLY):
        waiting = replace(RUNNING, wanted=wanted, awaited="ModelArtifact large: the download Job runs")
        step = next_step(waiting)
        assert (step.action, step.revision) == (Action.WAIT, wanted)
        assert "ModelArtifact large" in step.why
        assert next_step(replace(waiting, awaited="")).action is not Action.WAIT
    asleep = replace(RUNNING, suspended_spec=True, suspended=True, ready=False, num_clusters=0, gpus_held=0)
    assert next_step(replace(asleep, wanted=NEW, awaited="them")).action is Action.WAIT
    assert next_step(replace(RUNNING, awaited="them")).action is Action.NOTHING, "what runs already has its weights"
    assert next_step(replace(RUNNING, wanted=NEW, awaited="them", failed="new")).revision == OLD


def test_a_paused_rollout_keeps_what_is_applied() -> None:
    assert steps(replace(RUNNING, wanted=NEW, paused=True)) == ["Nothing old 4"]


def test_a_failed_surge_takes_the_pending_cluster_back_and_never_runs_three() -> None:
    stuck = replace(RUNNING, wanted=NEW, applied=NEW, ready=False, num_clusters=2, gpus_held=8, deadline_passed=True)
    assert steps(stuck) == [
        "MarkFailed old 8",
        "ReplacePending old 8",
        "DeletePending old 8",
        "Wait old 8",
        "Wait old 4",
        "Nothing old 4",
    ]


def test_a_failed_roll_back_stalls() -> None:
    stuck = replace(RUNNING, wanted=NEW, applied=OLD, failed="new", ready=False, deadline_passed=True)
    assert next_step(stuck).action is Action.STALL


def test_a_failed_rollout_without_a_good_revision_stalls() -> None:
    stuck = World(wanted=NEW, applied=NEW, num_clusters=1, deadline_passed=True)
    assert next_step(stuck).action is Action.STALL


def test_a_third_revision_replaces_the_pending_one() -> None:
    third = RevisionRef(name="third", cluster="c3", num_gpus=4)
    coming = replace(RUNNING, wanted=third, applied=NEW, ready=False, num_clusters=2, gpus_held=8)
    assert steps(coming)[:2] == ["ReplacePending third 8", "DeletePending third 8"]


def test_a_new_document_after_a_failed_one_is_tried() -> None:
    third = RevisionRef(name="third", cluster="c3", num_gpus=4)
    assert next_step(replace(RUNNING, wanted=third, failed="new")).action is Action.APPLY_CLUSTER


def test_suspending_stops_and_resuming_starts() -> None:
    assert steps(replace(RUNNING, suspend=True)) == ["Suspend old 4", "Wait old 0", "Nothing old 0"]
    asleep = replace(RUNNING, suspended_spec=True, suspended=True, ready=False, num_clusters=0, gpus_held=0)
    assert steps(asleep) == ["Resume old 4", "Wait old 4", "Nothing old 4"]


@given(
    old=st.integers(0, 16),
    new=st.integers(0, 16),
    spare=st.integers(0, 16),
    strategy=st.sampled_from(RolloutStrategy),
    same_cluster=st.booleans(),
)
def test_no_step_of_any_rollout_exceeds_the_budget(
    old: int, new: int, spare: int, strategy: RolloutStrategy, same_cluster: bool
) -> None:
    budget = max(old, new) + spare
    before = RevisionRef(name="old", cluster="c1", num_gpus=old)
    after = RevisionRef(name="new", cluster="c1" if same_cluster else "c2", num_gpus=old if same_cluster else new)
    world = World(
        wanted=after,
        applied=before,
        last_good=before,
        ready=True,
        num_clusters=1,
        gpus_held=old,
        gpu_budget=budget,
        strategy=strategy,
    )
    lines = preview(world)
    assert all(line.num_gpus <= budget for line in lines)
    assert lines[-1].action is Action.NOTHING
    assert lines[-1].revision == "new"
