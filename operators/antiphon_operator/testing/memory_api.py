"""An API server's behaviour in memory: versions, generations, ownership of fields, deletion, watches (control speed).

One thread, no I/O: every call is one atomic change. ``calls`` lists what was asked, ``faults`` may refuse it, ``clock`` stamps it.
Validation by schema is the API server's own business and left to it. Must not know: the operator.
"""

from __future__ import annotations

import bisect
import datetime
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import jsonpatch

from antiphon_operator.kube.base import (
    Conflict,
    Gone,
    KubeError,
    Labels,
    Listing,
    NotFound,
    Object,
    Refused,
    WatchEvent,
    error_of,
)
from antiphon_operator.kube.resources import Resource
from antiphon_operator.testing.field_sets import ITEM, exists, leaves, read, remove, to_fields_v1, write
from antiphon_operator.testing.json_values import SERVER_METADATA, appliable, comparable, copied, merge_patch, received, spec_part
from antiphon_operator.testing.stored import Key, Owner, Stored, is_in, key_of, kind_of, matches


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One request, as role-based access control sees it."""

    verb: str
    group: str
    resource: str  # with /status or /scale
    namespace: str
    name: str

    @property
    def writes(self) -> bool:
        """True unless it only reads."""
        return self.verb not in ("get", "list", "watch")


class MemoryApi:
    """The state of a cluster. Every method is one atomic request; ``changed`` is called after each change."""

    def __init__(self, *, clock: Callable[[], float], history: int = 10_000, uids: str = "uid") -> None:
        self.calls: list[Call] = []
        self.faults: list[Callable[[Call], KubeError | None]] = []
        self.undeclared: set[tuple[str, str]] = set()  # (plural, field of spec) that a kind's definition lacks
        self.listeners: list[Callable[[], None]] = []
        self.quiet = False  # while True, calls are neither recorded nor refused: other controllers' work
        self._clock = clock
        self._history = history
        self._version = 0
        self._objects: dict[Key, Stored] = {}
        self._keys: dict[str, set[Key]] = {}  # of each kind, so that a list does not walk everything
        self._log: list[tuple[int, str, WatchEvent]] = []
        self._dropped = 0  # versions up to this one are gone from the log
        self._gone: set[str] = set()  # uids of what was removed
        self._uid = 0
        self._uids = uids  # what its uids start with

    # Reading

    def get(self, resource: Resource, namespace: str | None, name: str) -> Object | None:
        """The object, or None."""
        self._ask("get", resource, namespace, name)
        stored = self._objects.get(key_of(resource, namespace, name))
        return None if stored is None else copied(stored.value)

    def list(self, resource: Resource, namespace: str | None, labels: Labels | None = None) -> Listing:
        """Objects of the kind."""
        self._ask("list", resource, namespace, "")
        wanted = kind_of(resource)
        found = sorted(key for key in self._keys.get(wanted, ()) if namespace in (None, key[1]))
        items = tuple(copied(s.value) for s in map(self._objects.__getitem__, found) if matches(s.value, labels))
        return Listing(items=items, resource_version=str(self._version))

    def events_since(
        self, resource: Resource, namespace: str | None, version: int, labels: Labels | None = None
    ) -> tuple[tuple[WatchEvent, ...], int]:
        """Changes after ``version`` and the version reached.

        Raises:
            Gone: some of them are forgotten.
        """
        if version < self._dropped:
            raise Gone(f"too old resource version: {version} ({self._dropped})")
        later = bisect.bisect_right(self._log, version, key=lambda entry: entry[0])
        wanted = kind_of(resource)
        found = tuple(
            event
            for _, kind, event in self._log[later:]
            if kind == wanted and is_in(event.object, namespace) and matches(event.object, labels)
        )
        return found, self._version

    def begin_watch(self, resource: Resource, namespace: str | None) -> None:
        """Record a watch request; faults may refuse it."""
        self._ask("watch", resource, namespace, "")

    def take_over(self, other: MemoryApi) -> None:
        """Take every object of ``other``, which must have uids of its own and not be used any more."""
        for key, stored in other._objects.items():
            self._keep(key, stored)
        self._version = max(self._version, other._version)

    def forget_history(self) -> None:
        """Forget all changes: watches from before answer 410."""
        self._log.clear()
        self._dropped = self._version

    # Writing

    def create(self, resource: Resource, value: Object, *, manager: str = "test") -> Object:
        """Create; Conflict where it exists."""
        namespace, name = value["metadata"].get("namespace"), self._named(value)
        self._ask("create", resource, namespace, name)
        if key_of(resource, namespace, name) in self._objects:
            raise Conflict(f"{resource.plural} {name!r} already exists")
        new = self._new(resource, value)
        new.value.pop("status", None) if resource.kind not in ("Pod", "Event") else None
        self._record_update(new, {}, manager, "")
        return self._store(resource, new, "ADDED")

    def apply(self, resource: Resource, value: Object, *, manager: str, force: bool = False, subresource: str = "") -> Object:
        """Server-side apply, of everything but status, or of status only."""
        namespace, name = value["metadata"].get("namespace"), str(value["metadata"]["name"])
        self._ask("patch", resource, namespace, name, subresource)
        for plural, spec_field in self.undeclared:
            if plural == resource.plural and spec_field in value.get("spec", {}):
                raise error_of(500, f"failed to create typed patch object: .spec.{spec_field}: field not declared in schema")
        stored = self._objects.get(key_of(resource, namespace, name))
        if stored is None:
            if subresource:
                raise NotFound(f"{resource.plural} {name!r} not found")
            self._ask("create", resource, namespace, name)
            new = self._new(resource, {"metadata": {"name": name, "namespace": namespace}})
            self._merge(new, appliable(value, subresource), manager, force=force, subresource=subresource)
            return self._store(resource, new, "ADDED")
        self._check_version(stored, value)
        draft = stored.copied()
        self._merge(draft, appliable(value, subresource), manager, force=force, subresource=subresource)
        return self._replace(resource, stored, draft)

    def json_patch(
        self,
        resource: Resource,
        namespace: str | None,
        name: str,
        patch: Sequence[Object],
        *,
        manager: str,
        subresource: str = "",
    ) -> Object:
        """An RFC 6902 patch."""
        self._ask("patch", resource, namespace, name, subresource)
        stored = self._present(resource, namespace, name)
        versions = [op for op in patch if op["path"] == "/metadata/resourceVersion"]
        if any(op["op"] == "test" and op["value"] != stored.value["metadata"]["resourceVersion"] for op in versions):
            raise Conflict(f"{resource.plural} {name!r}: the object has been modified")
        try:
            patched = jsonpatch.apply_patch(stored.value, list(patch))
        except jsonpatch.JsonPatchTestFailed as error:
            raise Refused(f"{resource.plural} {name!r}: {error}") from error
        except (jsonpatch.JsonPatchException, jsonpatch.JsonPointerException) as error:
            raise Refused(f"{resource.plural} {name!r}: {error}") from error
        return self._update(resource, stored, patched, manager, subresource)

    def merge_patch(
        self, resource: Resource, namespace: str | None, name: str, patch: Object, *, manager: str, subresource: str = ""
    ) -> Object:
        """An RFC 7386 patch, as kubectl and kopf send."""
        self._ask("patch", resource, namespace, name, subresource)
        stored = self._present(resource, namespace, name)
        self._check_version(stored, patch)
        return self._update(resource, stored, merge_patch(stored.value, patch), manager, subresource)

    def update(self, resource: Resource, value: Object, *, manager: str, subresource: str = "") -> Object:
        """Replace, as a controller's client does."""
        namespace, name = value["metadata"].get("namespace"), str(value["metadata"]["name"])
        self._ask("update", resource, namespace, name, subresource)
        stored = self._present(resource, namespace, name)
        self._check_version(stored, value)
        return self._update(resource, stored, value, manager, subresource)

    def delete(self, resource: Resource, namespace: str | None, name: str, *, uid: str | None = None) -> None:
        """Delete the object and, through owner references, what it owns; finalizers hold it back."""
        self._ask("delete", resource, namespace, name)
        stored = self._present(resource, namespace, name)
        if uid is not None and stored.value["metadata"]["uid"] != uid:
            raise Conflict(f"{resource.plural} {name!r}: the uid is another")
        if stored.value["metadata"].get("finalizers"):
            if "deletionTimestamp" not in stored.value["metadata"]:
                stored.value["metadata"]["deletionTimestamp"] = self._now()
                self._log_event(resource, stored, "MODIFIED")
            return
        self._remove(key_of(resource, namespace, name))

    # Inside

    def _ask(self, verb: str, resource: Resource, namespace: str | None, name: str, subresource: str = "") -> None:
        if self.quiet:
            return
        plural = f"{resource.plural}/{subresource}" if subresource else resource.plural
        call = Call(verb=verb, group=resource.group, resource=plural, namespace=namespace or "", name=name)
        self.calls.append(call)
        for fault in tuple(self.faults):
            error = fault(call)
            if error is not None:
                raise error

    def _present(self, resource: Resource, namespace: str | None, name: str) -> Stored:
        stored = self._objects.get(key_of(resource, namespace, name))
        if stored is None:
            raise NotFound(f"{resource.plural} {name!r} not found")
        return stored

    @staticmethod
    def _check_version(stored: Stored, value: Object) -> None:
        version = value.get("metadata", {}).get("resourceVersion")
        if version is not None and version != stored.value["metadata"]["resourceVersion"]:
            raise Conflict(f"{stored.value['metadata']['name']!r}: the object has been modified")

    def _named(self, value: Object) -> str:
        metadata = value["metadata"]
        if "name" not in metadata and "generateName" in metadata:
            metadata["name"] = f"{metadata['generateName']}{self._version:05d}"
        return str(metadata["name"])

    def _new(self, resource: Resource, value: Object) -> Stored:
        self._uid += 1
        out = received(value)
        metadata = {k: v for k, v in out.get("metadata", {}).items() if v is not None and k not in SERVER_METADATA}
        metadata |= {"uid": f"{self._uids}-{self._uid}", "generation": 1, "creationTimestamp": self._now()}
        return Stored(value={**out, "apiVersion": resource.api_version, "kind": resource.kind, "metadata": metadata})

    def _merge(self, stored: Stored, config: Object, manager: str, *, force: bool, subresource: str) -> None:
        wanted = dict(leaves(config))
        owner = self._owner(stored, manager, "Apply", subresource)
        conflicts = sorted(
            {
                f"{other.manager}: {'.'.join(step.removeprefix('f:') for step in path)}"
                for other in stored.owners
                if other is not owner
                for path in other.fields & wanted.keys()
                if exists(stored.value, path) and read(stored.value, path) != wanted[path]
            }
        )
        if conflicts and not force:
            raise Conflict(f"Apply failed with {len(conflicts)} conflicts with " + "; ".join(conflicts))
        if conflicts:
            for other in stored.owners:
                if other is not owner:
                    other.fields -= {p for p in wanted if read(stored.value, p) != wanted[p]}
        elsewhere = frozenset().union(*(other.fields for other in stored.owners if other is not owner))
        # Whole list items first: without its key an item is found no more.
        for path in sorted(owner.fields - wanted.keys(), key=lambda p: (p[-1] != ITEM, p)):
            shared = path[-1] == ITEM and any(other[: len(path) - 1] == path[:-1] for other in elsewhere)
            if path not in elsewhere and not shared:
                remove(stored.value, path)
        for path, new in wanted.items():
            write(stored.value, path, new)
        owner.fields = frozenset(wanted)
        stored.owners = [o for o in stored.owners if o.fields]

    def _owner(self, stored: Stored, manager: str, operation: Literal["Apply", "Update"], subresource: str) -> Owner:
        for owner in stored.owners:
            if (owner.manager, owner.operation, owner.subresource) == (manager, operation, subresource):
                return owner
        owner = Owner(manager=manager, operation=operation, subresource=subresource, fields=frozenset(), time=self._now())
        stored.owners.append(owner)
        return owner

    def _update(self, resource: Resource, stored: Stored, value: Object, manager: str, subresource: str) -> Object:
        draft = stored.copied()
        if subresource == "status":
            draft.value["status"] = received(value.get("status", {}))
        else:
            status = stored.value.get("status")
            draft.value = received(value)
            draft.value.pop("status", None)
            if status is not None:
                draft.value["status"] = copied(status)
            server = {k: v for k, v in stored.value["metadata"].items() if k in SERVER_METADATA}
            draft.value["metadata"] = {
                **{k: v for k, v in draft.value["metadata"].items() if k not in SERVER_METADATA},
                **server,
            }
        self._record_update(draft, stored.value, manager, subresource)
        return self._replace(resource, stored, draft)

    def _record_update(self, draft: Stored, before: Object, manager: str, subresource: str) -> None:
        old, new = dict(leaves(appliable(before, None))), dict(leaves(appliable(draft.value, None)))
        touched = frozenset(path for path, value in new.items() if path not in old or old[path] != value)
        gone = old.keys() - new.keys()
        for owner in draft.owners:
            owner.fields -= touched | gone
        if touched:
            self._owner(draft, manager, "Update", subresource).fields |= touched
        draft.owners = [o for o in draft.owners if o.fields]

    def _replace(self, resource: Resource, stored: Stored, draft: Stored) -> Object:
        same_fields = {(o.manager, o.operation, o.subresource, o.fields) for o in stored.owners} == {
            (o.manager, o.operation, o.subresource, o.fields) for o in draft.owners
        }
        if comparable(draft.value) == comparable(stored.value) and same_fields:
            return copied(stored.value)
        if spec_part(draft.value) != spec_part(stored.value):
            draft.value["metadata"]["generation"] += 1
        metadata = draft.value["metadata"]
        if "deletionTimestamp" in metadata and not metadata.get("finalizers"):
            key = key_of(resource, metadata.get("namespace"), metadata["name"])
            self._keep(key, draft)
            self._remove(key)
            return copied(draft.value)
        return self._store(resource, draft, "MODIFIED")

    def _store(self, resource: Resource, stored: Stored, type_: Literal["ADDED", "MODIFIED"]) -> Object:
        metadata = stored.value["metadata"]
        self._keep(key_of(resource, metadata.get("namespace"), metadata["name"]), stored)
        self._log_event(resource, stored, type_)
        owners = metadata.get("ownerReferences", ())
        if type_ == "ADDED" and owners and all(owner["uid"] in self._gone for owner in owners):
            made = copied(stored.value)
            self._remove(key_of(resource, metadata.get("namespace"), metadata["name"]))  # the garbage collector is never far
            return made
        return copied(stored.value)

    def _log_event(self, resource: Resource, stored: Stored, type_: Literal["ADDED", "MODIFIED", "DELETED"]) -> None:
        self._version += 1
        stored.value["metadata"]["resourceVersion"] = str(self._version)
        stored.value["metadata"]["managedFields"] = [
            {
                "manager": owner.manager,
                "operation": owner.operation,
                "apiVersion": resource.api_version,
                "time": owner.time,
                "fieldsType": "FieldsV1",
                "fieldsV1": to_fields_v1(owner.fields),
            }
            | ({"subresource": owner.subresource} if owner.subresource else {})
            for owner in stored.owners
        ]
        self._log.append((self._version, kind_of(resource), WatchEvent(type=type_, object=copied(stored.value))))
        if len(self._log) > self._history:
            self._dropped = self._log[0][0]
            del self._log[0]
        for listener in tuple(self.listeners):
            listener()

    def _keep(self, key: Key, stored: Stored) -> None:
        self._objects[key] = stored
        self._keys.setdefault(key[0], set()).add(key)

    def _remove(self, key: Key) -> None:
        stored = self._objects.pop(key, None)
        if stored is None:
            return
        self._keys[key[0]].discard(key)
        group_kind = key[0]
        plural, _, group = group_kind.partition(".")
        version = stored.value["apiVersion"].rpartition("/")[2]
        resource = Resource(group=group, version=version, kind=stored.value["kind"], plural=plural)
        self._log_event(resource, stored, "DELETED")
        uid = stored.value["metadata"]["uid"]
        self._gone.add(uid)
        for child, owned in list(self._objects.items()):
            owners = owned.value["metadata"].get("ownerReferences", [])
            if any(o["uid"] == uid for o in owners) and all(o["uid"] == uid for o in owners):
                if owned.value["metadata"].get("finalizers"):
                    owned.value["metadata"].setdefault("deletionTimestamp", self._now())
                else:
                    self._remove(child)

    def _now(self) -> str:
        return datetime.datetime.fromtimestamp(int(self._clock()), datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
