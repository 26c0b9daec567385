"""Shows a rollout before it happens, from two documents (control speed, pure).

Must not know: the API server.
"""

from __future__ import annotations

from dataclasses import dataclass

from antiphon.core.document.spec import LLMDeployment
from antiphon.core.errors import InvalidInput
from antiphon_operator.planning.rollout import Action, RevisionRef, World, preview
from antiphon_operator.render.revision import Revision, render_revision
from antiphon_operator.render.serve import sizes_of
from antiphon_operator.render.settings import Settings

_TEXT = {
    Action.CREATE: "create the pools",
    Action.APPLY_SERVE: "change the application in place",
    Action.APPLY_CLUSTER: "start new pools",
    Action.SUSPEND: "stop all pools",
    Action.RESUME: "start the pools again",
    Action.REPLACE_PENDING: "take the unfinished pools back",
    Action.DELETE_PENDING: "stop the unfinished pools",
    Action.MARK_FAILED: "give the revision up",
    Action.WAIT: "wait",
    Action.STALL: "stop and say Stalled",
    Action.NOTHING: "done",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One step, for people and for programs."""

    action: str
    revision: str
    num_gpus: int
    text: str

    def as_json(self) -> dict[str, object]:
        """The step for programs."""
        return {"action": self.action, "revision": self.revision, "gpus": self.num_gpus, "text": self.text}


def preview_documents(before: LLMDeployment | None, after: LLMDeployment, settings: Settings) -> list[Line]:
    """The steps from ``before`` (None = nothing runs) to ``after``.

    Raises:
        InvalidInput: the documents are of different deployments, or change what can't be changed.
    """
    wanted = render_revision(after, settings, None)
    spec = after.spec
    world = World(
        wanted=_ref(wanted, after),
        applied=None,
        strategy=spec.rollout.strategy,
        paused=spec.rollout.paused,
        auto_rollback=spec.rollout.auto_rollback,
        suspend=spec.suspend,
        gpu_budget=spec.gpu_budget,
    )
    sizes: list[Line] = []
    if before is not None:
        _check(before, after)
        applied = _ref(render_revision(before, settings, None), before)
        asleep = before.spec.suspend
        world = World(
            wanted=world.wanted, applied=applied, last_good=applied, strategy=world.strategy, paused=world.paused,
            auto_rollback=world.auto_rollback, suspend=world.suspend, gpu_budget=world.gpu_budget,
            gpus_held=0 if asleep else applied.num_gpus, num_clusters=0 if asleep else 1,
            ready=not asleep, suspended_spec=asleep, suspended=asleep,
        )  # fmt: skip
        sizes = _resized(before, after)
    steps = [
        Line(
            action=line.action.value,
            revision=line.revision,
            num_gpus=line.num_gpus,
            text=f"{_TEXT[line.action]} ({line.why}); revision {line.revision}, {line.num_gpus} accelerators",
        )
        for line in preview(world)
    ]
    return sizes + steps


def _ref(revision: Revision, document: LLMDeployment) -> RevisionRef:
    return RevisionRef(name=revision.name, cluster=revision.cluster_revision, num_gpus=revision.num_gpus(sizes_of(document)))


def _check(before: LLMDeployment, after: LLMDeployment) -> None:
    if before.metadata.name != after.metadata.name:
        raise InvalidInput(f"the documents are of {before.metadata.name} and {after.metadata.name}", "metadata.name")
    if before.spec.topology is not after.spec.topology:
        raise InvalidInput("topology can't be changed: create a deployment of another name", "spec.topology")


def _resized(before: LLMDeployment, after: LLMDeployment) -> list[Line]:
    old, new = sizes_of(before), sizes_of(after)
    gpus = sum(p.resources.gpu * new[p.name] for p in after.spec.pools)
    return [
        Line(
            action="Scale",
            revision="",
            num_gpus=gpus,
            text=f"scale {name} from {old[name]} to {new[name]} in place",
        )
        for name in sorted(old.keys() & new.keys())
        if old[name] != new[name]
    ]
