"""The reference values a verifier judges by, read again while it runs.

1. A configured path is a signed set, or a folder of signed sets (`*.cose`). When any of these files changes, or an operator
   says so (`moor verifier reload`), all are read: each signed by a configured signer, valid now, not older than was used.
2. Only when every one of them is good, and they can be merged, does the verifier judge by them, from one host to the next.
   One bad set changes nothing: the sets before it stay in force, and what was wrong is logged and told to who asked.
3. A host's files are judged by the new sets from the beginning of its list: the verifier asks for all of it again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import structlog
from fastapi import FastAPI, Request

from moorline.clock import Clock
from moorline.errors import MoorlineError
from moorline.nfv import Role
from moorline.policy import reference_values
from moorline.policy.reference_values import Reference, ReferenceValues
from moorline.services import http
from moorline.services import verifier_files as files
from moorline.services.attestation_authority import AttestationAuthority
from moorline.storage.verifier_store import VerifierStore
from moorline.wire import keys

LOOK_EVERY_S: Final = 2.0
_SETS: Final = "*.cose"
_LOG: Final = structlog.stdlib.get_logger("verifier")


@dataclass(frozen=True, slots=True, kw_only=True)
class Sources:
    """Where the sets are, who may have signed them, and the store that remembers their serials."""

    paths: tuple[Path, ...]
    signers: tuple[keys.PublicKey, ...]
    store: VerifierStore
    clock: Clock

    def read(self) -> tuple[Reference, tuple[ReferenceValues, ...]]:
        """All sets, merged and one by one. Raises what any of them is refused for, and Misconfigured."""
        now = self.clock.now()
        sets = tuple(reference_values.parse_verified(files.read(path), self.signers, now=now) for path in _files(self.paths))
        reference = reference_values.merge(sets)
        for one in sets:
            self.store.accept_serial(one.name, one.serial)
        return reference, sets

    def stamp(self) -> tuple[tuple[str, int, int, int], ...]:
        """What changes when a file does."""
        found = []
        for path in _files(self.paths):
            try:
                seen = path.stat()
            except OSError:
                continue
            found.append((str(path), seen.st_mtime_ns, seen.st_size, seen.st_ino))
        return tuple(found)


class References:
    """The sets in force, and the way to the next ones. `last` is why the last reading was refused, if it was."""

    def __init__(self, sources: Sources, sets: Sequence[ReferenceValues], authority: AttestationAuthority) -> None:
        self._sources, self._authority = sources, authority
        self._sets, self._turn = tuple(sets), asyncio.Lock()
        self._stamp = sources.stamp()
        self.last: MoorlineError | None = None

    async def reload(self) -> None:
        """Numbers 1 and 2 of the module. Raises what a set is refused for; the sets before it then stay in force."""
        async with self._turn:
            self._stamp = await asyncio.to_thread(self._sources.stamp)
            try:
                reference, sets = await asyncio.to_thread(self._sources.read)
            except MoorlineError as error:
                self.last = error
                raise
            self.last = None
            self._authority.judge_by(reference)
            self._sets = sets
        _LOG.info("reference values", digest=reference.digest.hex(), sets=[f"{one.name} {one.serial}" for one in sets])

    async def keep(self) -> None:
        """Read again whenever a file changes, until cancelled."""
        while True:
            await asyncio.sleep(LOOK_EVERY_S)
            if await asyncio.to_thread(self._sources.stamp) == self._stamp:
                continue
            try:
                await self.reload()
            except MoorlineError as error:
                _LOG.warning("reference values refused, the ones before stay", **error.as_problem())

    def as_json(self) -> dict[str, object]:
        """What is in force."""
        sets = [{"name": one.name, "serial": one.serial, "not_after": one.not_after} for one in self._sets]
        return {"digest": self._authority.reference.digest.hex(), "sets": sets}


def add_routes(app: FastAPI, references: References, *, trust_domain: str) -> None:
    """What is in force, and reading it again; for operators."""

    @app.get("/v1/references")
    async def shown(request: Request) -> dict[str, object]:
        """The sets in force, and why the last reading was refused, if it was."""
        http.require(request, Role.OPERATOR, trust_domain=trust_domain)
        refused = None if references.last is None else references.last.as_problem()
        return {**references.as_json(), "refused": refused}

    @app.post("/v1/references/reload")
    async def reload(request: Request) -> dict[str, object]:
        """Read all sets again, now."""
        http.require(request, Role.OPERATOR, trust_domain=trust_domain)
        await references.reload()
        return references.as_json()


def _files(paths: tuple[Path, ...]) -> tuple[Path, ...]:
    return tuple(file for path in paths for file in (sorted(path.glob(_SETS)) if path.is_dir() else (path,)))
