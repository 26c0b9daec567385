"""A composition's artifact on this machine: found, loaded, and swapped in when it has changed (control speed).

Must not know: how an artifact decides.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from pathlib import Path

from antiphon.coe.routing.artifact import Artifact, load_artifact
from antiphon.coe.routing.router import Router
from antiphon.coe.serving.deciders import LocalRoutes
from antiphon.core.document.composition import CompositionOfExperts
from antiphon.core.errors import AntiphonError, InvalidInput

_log = logging.getLogger(__name__)


class WatchedRoutes(LocalRoutes):
    """The router of this process over the document's artifact; a new one is taken while the old one decides.

    Raises:
        CheckpointInvalid: the artifact can't be loaded; the message names it.
        InvalidInput: document and artifact don't fit.
    """

    def __init__(self, document: CompositionOfExperts, replica: str) -> None:
        super().__init__(Router(document.spec, load(document), replica=f"{replica}-{secrets.token_hex(16)}"))
        self._document = document
        self._seen = _stamp(document)

    async def refresh(self) -> None:
        """Swap in an artifact whose manifest has changed; one that can't be loaded is named in the log and the old one goes on."""
        stamp = _stamp(self._document)
        if stamp is None or stamp == self._seen:
            return
        self._seen = stamp
        try:
            artifact = await asyncio.to_thread(load, self._document)
            if artifact is not None:
                self.router.swap(artifact)
                _log.info("%s: decides with artifact %s now", self._document.model_name, artifact.digest)
        except AntiphonError as error:
            _log.error("%s: the new artifact is refused, the old one goes on: %s", self._document.model_name, error)


def artifact_directory(document: CompositionOfExperts) -> Path | None:
    """Where the document's artifact is; None when it has none.

    Raises:
        InvalidInput: the uri is not a path of this machine.
    """
    reference = document.spec.router.artifact
    if reference is None:
        return None
    scheme, separator, rest = reference.uri.partition("://")
    if not separator:
        return Path(reference.uri)
    if scheme != "file":
        raise InvalidInput(
            f"artifact {reference.uri}: only paths and file:// are read here; mount others", "spec.router.artifact.uri"
        )
    return Path(rest)


def load(document: CompositionOfExperts) -> Artifact | None:
    """The document's artifact; None when it has none.

    Raises:
        CheckpointInvalid: it can't be loaded; the message names it.
        InvalidInput: its uri is not a path of this machine.
    """
    directory = artifact_directory(document)
    if directory is None:
        return None
    router = document.spec.router
    digest = None if router.artifact is None else router.artifact.digest
    return load_artifact(directory, slow_path=router.slow_path == "auto", digest=digest)


def _stamp(document: CompositionOfExperts) -> tuple[int, int] | None:
    directory = artifact_directory(document)
    if directory is None:
        return None
    try:
        found = (directory / "manifest.json").stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_ino
