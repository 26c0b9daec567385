"""How one revision replaces another, one step at a time (control speed, pure).

    Absent --Create--> Starting --ready--> Settled
    Settled --serve differs--> ApplyServe --> Starting (in place, no pod is replaced)
    Settled --cluster differs, Surge fits the budget--> ApplyCluster --> Starting (two clusters) --ready, old one gone--> Settled
    Settled --another is wanted whose weights are still on their way--> Wait (what serves is left alone) --> Settled
    Settled --cluster differs, else--> Suspend --> Suspending --suspended--> Resume --> Starting
    Starting --another cluster wanted, two run--> ReplacePending --> DeletePending --> Starting (never a third cluster)
    Starting --no progress until the deadline, a good revision is known--> MarkFailed (the good one is wanted from now on)
    Starting --no progress until the deadline, else--> Stall (until the document changes)

KubeRay starts a further cluster whenever the wanted one differs from the pending one. Replacing a pending cluster therefore
tells it to start none of its own accord, and deletes the pending one, which KubeRay then builds anew as wanted.

Must not know: Kubernetes objects.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum

from antiphon.core.document.policies import RolloutStrategy


class Action(StrEnum):
    """What to write next."""

    CREATE = "Create"
    APPLY_SERVE = "ApplyServe"
    APPLY_CLUSTER = "ApplyCluster"
    SUSPEND = "Suspend"
    RESUME = "Resume"
    REPLACE_PENDING = "ReplacePending"
    DELETE_PENDING = "DeletePending"
    MARK_FAILED = "MarkFailed"
    WAIT = "Wait"
    STALL = "Stall"
    NOTHING = "Nothing"


@dataclass(frozen=True, slots=True, kw_only=True)
class RevisionRef:
    """The part of a revision that planning needs."""

    name: str
    cluster: str  # cluster revision
    num_gpus: int = 0  # at the sizes asked for


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """What is seen, and what the document asks for."""

    wanted: RevisionRef
    applied: RevisionRef | None  # what the RayService says now; None = there is no RayService
    last_good: RevisionRef | None = None
    failed: str = ""  # revision that missed its deadline
    strategy: RolloutStrategy = RolloutStrategy.SURGE
    paused: bool = False
    auto_rollback: bool = True
    suspend: bool = False
    gpu_budget: int | None = None
    gpus_held: int = 0  # by pods of every cluster
    ready: bool = False  # the applied revision serves
    suspended_spec: bool = False  # spec.suspend of the RayService
    suspended: bool = False  # KubeRay says that everything is gone
    num_clusters: int = 0
    stale_pending: str = ""  # pending cluster that is not of the revision to bring in
    deadline_passed: bool = False
    awaited: str = ""  # what the wanted revision's weights still wait for


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One step: what to write, which revision it concerns, and why, for people."""

    action: Action
    revision: RevisionRef
    why: str
    strategy: RolloutStrategy | None = None


_RECREATE = RolloutStrategy.RECREATE


def target_of(world: World) -> RevisionRef:
    """The revision to bring in: what is wanted, or the last good one when that has failed."""
    if world.paused and world.applied is not None:
        return world.applied
    if world.failed == world.wanted.name and world.auto_rollback and world.last_good is not None:
        return world.last_good
    return world.wanted


def effective_strategy(world: World, target: RevisionRef) -> RolloutStrategy:
    """Surge only where both revisions fit the budget together."""
    too_many = world.gpu_budget is not None and world.gpus_held + target.num_gpus > world.gpu_budget
    return RolloutStrategy.RECREATE if too_many else world.strategy


def next_step(world: World) -> Step:
    """The next step from ``world``; applied again and again it ends at NOTHING, or at STALL."""
    target = target_of(world)
    applied = world.applied
    if applied is None:
        return Step(action=Action.CREATE, revision=target, why="no RayService exists")
    if world.suspend:
        return _suspended(world, applied)
    if world.suspended_spec and not world.suspended:
        return Step(action=Action.WAIT, revision=target, why="waiting for the old pods to stop", strategy=_RECREATE)
    if world.awaited and target.name == world.wanted.name != applied.name:
        return Step(action=Action.WAIT, revision=target, why=f"waiting for its weights: {world.awaited}")
    if world.suspended_spec:
        return Step(action=Action.RESUME, revision=target, why="the old pods are gone", strategy=_RECREATE)
    if applied.cluster != target.cluster:
        return _replace_cluster(world, applied, target)
    if applied.name != target.name:
        return Step(action=Action.APPLY_SERVE, revision=target, why="changes in place; no pod is replaced")
    if world.stale_pending:
        return Step(action=Action.DELETE_PENDING, revision=target, why="the pending cluster makes place")
    if world.ready:
        if world.num_clusters <= 1:
            return Step(action=Action.NOTHING, revision=target, why="ready")
        return Step(action=Action.WAIT, revision=target, why="waiting for the old cluster to stop")
    if world.deadline_passed:
        return _after_deadline(world, target)
    return Step(action=Action.WAIT, revision=target, why="waiting for all pools to serve")


def _suspended(world: World, applied: RevisionRef) -> Step:
    if not world.suspended_spec:
        return Step(action=Action.SUSPEND, revision=applied, why="the document asks for it")
    action = Action.NOTHING if world.suspended else Action.WAIT
    return Step(action=action, revision=applied, why="suspended, as the document asks")


def _replace_cluster(world: World, applied: RevisionRef, target: RevisionRef) -> Step:
    if world.num_clusters == 0:
        return Step(action=Action.APPLY_CLUSTER, revision=target, why="nothing runs that could be kept", strategy=_RECREATE)
    if world.num_clusters > 1:
        if world.ready:
            return Step(action=Action.WAIT, revision=applied, why="waiting for the old cluster to stop")
        return Step(
            action=Action.REPLACE_PENDING, revision=target, why="another revision is wanted; the pending cluster is taken back"
        )
    strategy = effective_strategy(world, target)
    if strategy is _RECREATE:
        why = "strategy Recreate" if world.strategy is strategy else "two clusters would exceed the accelerator budget"
        return Step(action=Action.SUSPEND, revision=applied, why=why, strategy=strategy)
    return Step(action=Action.APPLY_CLUSTER, revision=target, why="the new cluster starts beside the old one", strategy=strategy)


def _after_deadline(world: World, target: RevisionRef) -> Step:
    good = world.last_good
    if world.auto_rollback and not world.paused and good is not None and target.name == world.wanted.name != good.name:
        return Step(action=Action.MARK_FAILED, revision=good, why="no progress until the deadline: back to the last good one")
    return Step(action=Action.STALL, revision=target, why="no progress until the deadline")


@dataclass(frozen=True, slots=True, kw_only=True)
class PreviewLine:
    """One line of a previewed rollout."""

    action: Action
    revision: str
    num_gpus: int  # in use right after the step
    why: str


def preview(world: World) -> list[PreviewLine]:
    """The steps of the whole rollout, as they go when everything works.

    Raises:
        RuntimeError: the steps do not end (a bug of ours).
    """
    lines: list[PreviewLine] = []
    for _ in range(32):
        step = next_step(world)
        world = _imagine(world, step)
        lines.append(PreviewLine(action=step.action, revision=step.revision.name, num_gpus=world.gpus_held, why=step.why))
        if step.action in (Action.NOTHING, Action.STALL):
            return lines
    raise RuntimeError("a rollout of more than 32 steps")


def _imagine(world: World, step: Step) -> World:
    """``world`` after ``step``, KubeRay and the pods doing what they should."""
    gpus, one = step.revision.num_gpus, world.num_clusters == 0
    match step.action:
        case Action.CREATE if world.suspend:
            return replace(world, applied=step.revision, suspended_spec=True, suspended=True)
        case Action.CREATE | Action.RESUME | Action.APPLY_CLUSTER:
            return replace(
                world,
                applied=step.revision,
                suspended_spec=False,
                suspended=False,
                gpus_held=gpus if one else world.gpus_held + gpus,
                num_clusters=1 if one else world.num_clusters + 1,
                ready=False,
            )
        case Action.APPLY_SERVE:
            return replace(world, applied=step.revision, ready=False)
        case Action.REPLACE_PENDING:
            return replace(world, applied=step.revision, stale_pending="pending")
        case Action.DELETE_PENDING:
            return replace(world, stale_pending="")
        case Action.MARK_FAILED:
            return replace(world, failed=world.wanted.name, deadline_passed=False)
        case Action.SUSPEND:
            return replace(world, suspended_spec=True, ready=False)
        case Action.WAIT if world.suspended_spec:
            return replace(world, suspended=True, num_clusters=0, gpus_held=0)
        case Action.WAIT if world.ready:
            return replace(world, num_clusters=1, gpus_held=gpus)
        case Action.WAIT:
            return replace(world, ready=True)
        case Action.STALL | Action.NOTHING:
            return world
