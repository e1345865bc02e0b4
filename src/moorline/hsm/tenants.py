"""Virtual HSMs: each tenant has a token (or partition) of its own, with its own PIN, door, quota and log (SEC009 6.20.3).

What separates tenants is the module, not a check of ours: a tenant's door leads to the sessions of its own token, and there
is no name by which another's key could be meant. So "not yours" and "does not exist" are one answer by construction, labels
and counts are the token's own, and a tenant's log is numbered for itself. Names of tenants are neither in
the token nor in the file system: both have a random label, and other users cannot list the folder of folders.

Create: intent, token, state. Destroy, which a quorum of custodians must have approved:
1. The intent is recorded and the door shut; nobody uses the token any more.
2. Every object is destroyed through the module, and a fresh login must see none.
3. The token itself is removed and the module must not list it any more (SoftHSM: its directory; another HSM: its own tool).
4. What was seen is signed by the HSM identity and kept.
A process that died in between goes on at its next start (`recover`); a creation that died is taken back.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Final

from moorline.clock import Clock, Instant
from moorline.errors import Conflict, Misconfigured, MoorlineError, Refused, Unavailable
from moorline.hsm.fairness import Quota
from moorline.hsm.token import LocalToken, TokenLocation, initialise_token, open_token
from moorline.hsm.token.calls import MAKES_KEYS, TENANT_ROLES, Call
from moorline.hsm.token.owner import Door, Owner, Peer
from moorline.hsm.token.softhsm import finish_pin, is_listed, remove_token, set_pin
from moorline.nfv import parse_name
from moorline.storage.hsm_store import HsmStore, TenantRow
from moorline.storage.steps import reached
from moorline.wire import cose, keys, schema
from moorline.wire.schema import Size

PROOF_PURPOSE: Final = "tenant-destroyed"
MOST_UID: Final = 2**32 - 2
"""The last number that is a user's: the one behind it tells chown(2) to leave the owner as it is."""
MOST_KEYS: Final = 1_000_000
MOST_OPERATIONS: Final = 10**9
_LANES: Final = 2
_LABEL_BYTES: Final = 8


class State(StrEnum):
    """Of a tenant."""

    CREATING = "creating"
    ACTIVE = "active"
    SUSPENDED = "suspended"
    DESTROYING = "destroying"
    DESTROYED = "destroyed"


@dataclass(frozen=True, slots=True, kw_only=True)
class DestructionRecord:
    """What was seen when a tenant was destroyed; signed by the HSM identity.

    It establishes that the module showed no object of the token to a fresh login, and then no such token; where `serial` is
    empty, that there was no such token any more when it was looked for. It does not establish that the medium below forgot:
    SoftHSM unlinks its objects, encrypted under a key in the token's own file; that file is overwritten once and unlinked.
    What the disk keeps of them is its own.
    """

    tenant: str
    serial: Annotated[str, Size(at_most=64)]
    objects_destroyed: int
    objects_seen_afterwards: int
    token_listed_afterwards: bool
    at: int


class VirtualHsm:
    """The tenants of one module. Safe for threads."""

    def __init__(
        self,
        base: TokenLocation,
        directory: Path,
        store: HsmStore,
        owner: Owner,
        clock: Clock,
        signer: Callable[[], keys.Signer],
    ) -> None:
        """`base` gives module and configuration; `directory` holds PINs and doors; `signer` is the HSM identity."""
        self._base, self._directory, self._store, self._owner = base, directory, store, owner
        self._clock, self._signer = clock, signer
        self._open: dict[str, LocalToken] = {}
        self._quotas: dict[str, Quota] = {}
        self._turn = threading.RLock()

    # -- the process's life -------------------------------------------------------------------------------------------------

    def recover(self) -> tuple[tuple[str, MoorlineError], ...]:
        """Finish or take back what a dead process left, and open the doors of active tenants; what failed, by tenant.

        A tenant that cannot be served (its PIN is lost, its partition away) keeps its state and stays shut; others open.
        """
        failed: list[tuple[str, MoorlineError]] = []
        with self._turn:
            for row in self._store.tenants():
                try:
                    self._go_on(row)
                except MoorlineError as error:
                    failed.append((row.name, error))
        return tuple(failed)

    def _go_on(self, row: TenantRow) -> None:
        if row.state == State.CREATING:
            self._take_back(row)
        elif row.state == State.DESTROYING:
            self._destroy(row)
        elif row.state in (State.ACTIVE, State.SUSPENDED):
            self._finish_pin(row)
            if row.state == State.ACTIVE:
                self._open_door(row)

    def close(self) -> None:
        """Shut the doors and close the tokens; tenants stay what they are."""
        with self._turn:
            for name in list(self._open):
                self._shut_door(name)

    # -- what the provider's people do --------------------------------------------------------------------------------------

    def create(self, name: str, *, uid: int, weight: int = 1, keys: int = 64, operations: int = 60_000) -> TenantRow:
        """A new tenant, served at `door_of(name)` to processes of user `uid`. Raises Conflict, Malformed or Unavailable."""
        now = self._clock.now()
        row = TenantRow(
            name=parse_name(name, "tenant"),
            token=f"t-{secrets.token_hex(_LABEL_BYTES)}",
            state=State.CREATING,
            uid=uid,
            weight=weight,
            keys=keys,
            operations=operations,
            created=now,
            changed=now,
        )
        if not (1 <= weight <= 100 and 1 <= keys <= MOST_KEYS and 1 <= operations <= MOST_OPERATIONS):
            raise Misconfigured(
                "tenant.quota",
                "weight and quotas have bounds",
                expected=f"weight 1 to 100, 1 to {MOST_KEYS} keys, 1 to {MOST_OPERATIONS} operations a minute",
                got=f"{weight}, {keys}, {operations}",
                remedy="choose other numbers",
            )
        if not 0 <= uid <= MOST_UID:
            raise Misconfigured(
                "tenant.uid", "this is no user's number", expected=f"0 to {MOST_UID}", got=uid, remedy="see id -u USER"
            )
        with self._turn:
            self._store.add_tenant(row)
            try:
                self._make(row)
            except MoorlineError:
                self._take_back(row)
                raise
            self._store.move_tenant(name, State.ACTIVE, self._clock.now())
            row = replace(row, state=State.ACTIVE)
            self._open_door(row)
            self._store.log(name, at=now, event="tenant-created", body={"tenant": name})
        return row

    def suspend(self, name: str) -> None:
        """Shut a tenant's door; its keys stay. Raises Refused or Conflict (`tenant.*`)."""
        with self._turn:
            self._require(name, State.ACTIVE)
            self._store.move_tenant(name, State.SUSPENDED, self._clock.now())
            self._shut_door(name)
            self._store.log(name, at=self._clock.now(), event="tenant-suspended", body={"tenant": name})

    def resume(self, name: str) -> None:
        """Open a suspended tenant's door again."""
        with self._turn:
            row = self._require(name, State.SUSPENDED)
            self._store.move_tenant(name, State.ACTIVE, self._clock.now())
            self._open_door(replace(row, state=State.ACTIVE))
            self._store.log(name, at=self._clock.now(), event="tenant-resumed", body={"tenant": name})

    def rotate(self, name: str) -> None:
        """A new PIN for the tenant's token; its door is shut for that moment. A crash leaves the old or the new one."""
        with self._turn:
            row = self._require(name, State.ACTIVE)
            self._shut_door(name)
            try:
                set_pin(self._location(row))
            finally:
                self._open_door(row)
            self._store.log(name, at=self._clock.now(), event="tenant-pin-rotated", body={"tenant": name})

    def destroy(self, name: str) -> bytes:
        """Destroy a tenant with its keys; the signed DestructionRecord. That a quorum approved is the caller's to know.

        One whose destruction began and could not end is gone on with.
        """
        with self._turn:
            row = self._require(name, State.ACTIVE, State.SUSPENDED, State.DESTROYING)
            if row.state != State.DESTROYING:
                self._store.move_tenant(name, State.DESTROYING, self._clock.now())
            return self._destroy(row)

    def destruction_began(self, name: str) -> bool:
        """Whether a destruction that a quorum approved waits to be ended. Raises Refused or Conflict (`tenant.*`)."""
        return self._require(name, State.ACTIVE, State.SUSPENDED, State.DESTROYING).state == State.DESTROYING

    def is_open(self, name: str) -> bool:
        """Whether the tenant is served now."""
        return name in self._open

    def rows(self) -> tuple[TenantRow, ...]:
        """All tenants, for the provider's people."""
        return self._store.tenants()

    def door_of(self, name: str) -> Path:
        """The socket of a tenant."""
        return self._folder(self._find(name)) / "door" / "hsm.sock"

    # -- steps --------------------------------------------------------------------------------------------------------

    def _require(self, name: str, *states: State) -> TenantRow:
        row = self._find(name)
        if row.state not in states:
            raise Conflict(
                "tenant.state",
                "the tenant is not in a state for this",
                expected=", ".join(states),
                got=row.state,
                remedy="moor hsm tenant list shows the states",
            )
        return row

    def _find(self, name: str) -> TenantRow:
        row = next((each for each in self._store.tenants() if each.name == name), None)
        if row is None:
            raise Refused("tenant.unknown", "there is no such tenant", got=name, remedy="moor hsm tenant list")
        return row

    def _folder(self, row: TenantRow) -> Path:
        # By the random label, not by the name: who can look into the file system must not find out who else is here.
        return self._directory / row.token

    def _location(self, row: TenantRow) -> TokenLocation:
        return TokenLocation(
            module=self._base.module,
            label=row.token,
            pin_file=self._folder(row) / "pin",
            environment=self._base.environment,
        )

    def _make(self, row: TenantRow) -> None:
        # The tenant's user passes through both to its door, and sees nothing on the way.
        self._directory.mkdir(mode=0o711, parents=True, exist_ok=True)
        self._folder(row).mkdir(mode=0o711, exist_ok=True)
        initialise_token(self._location(row))
        reached("hsm.tenant.token_made")

    def _take_back(self, row: TenantRow) -> None:
        remove_token(self._base, row.token)
        shutil.rmtree(self._folder(row), ignore_errors=True)
        self._store.forget_tenant(row.name)

    def _destroy(self, row: TenantRow) -> bytes:
        self._shut_door(row.name)
        location = self._location(row)
        destroyed, serial, left = 0, "", 0
        with contextlib.suppress(_Absent), _token_if_there(self._base, location) as token:
            serial = token.serial()
            destroyed = token.destroy_everything()
        reached("hsm.tenant.objects_destroyed")
        with contextlib.suppress(_Absent), _token_if_there(self._base, location) as token:
            left = len(token.inspect())
        if left:
            raise Unavailable(
                "tenant.not_empty", "the token still shows objects", got=left, remedy="destroy the tenant again"
            )
        listed = remove_token(self._base, row.token)
        reached("hsm.tenant.token_removed")
        record = DestructionRecord(
            tenant=row.name,
            serial=serial,
            objects_destroyed=destroyed,
            objects_seen_afterwards=left,
            token_listed_afterwards=listed,
            at=self._clock.now(),
        )
        signed = cose.sign(PROOF_PURPOSE, schema.encode(record), self._signer())
        shutil.rmtree(self._folder(row), ignore_errors=True)
        self._store.move_tenant(row.name, State.DESTROYED, Instant(record.at), proof=signed)
        self._store.log(row.name, at=Instant(record.at), event="tenant-destroyed", body={"tenant": row.name})
        return signed

    def _finish_pin(self, row: TenantRow) -> None:
        finish_pin(self._location(row))

    def _open_door(self, row: TenantRow) -> None:
        token = open_token(self._location(row), lanes=_LANES)
        quota = Quota(keys=row.keys, operations_a_minute=row.operations)
        self._open[row.name], self._quotas[row.name] = token, quota

        spending, making, mine = threading.Lock(), threading.Lock(), threading.local()

        def before(call: Call) -> None:
            with spending:
                quota.spend(self._clock.now())
            if call.operation in MAKES_KEYS:
                making.acquire()  # until `after`: two that come at once must not both find the last place free
                mine.making = True
                quota.require_room(sum(each.kind in ("private", "secret") for each in token.inspect()))

        def after(call: Call, peer: Peer, code: str | None) -> None:
            if getattr(mine, "making", False):
                mine.making = False
                making.release()
            body = {"key": call.label, "uid": str(peer.uid), "pid": str(peer.pid), "outcome": code or "done"}
            if call.operation in MAKES_KEYS or call.operation.startswith("destroy") or code is not None:
                self._store.log(row.name, at=self._clock.now(), event=f"hsm-{call.operation}"[:32], body=body)

        path = self._folder(row) / "door" / "hsm.sock"
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if os.geteuid() == 0:
            os.chown(path.parent, row.uid, -1)
        elif row.uid != os.geteuid():
            path.parent.chmod(0o711)  # who knows the path may knock; the kernel's word on who knocks decides
        self._owner.open(
            Door(
                name=f"tenant-{row.name}",
                path=path,
                token=token,
                uids=frozenset({row.uid}),
                roles=TENANT_ROLES,
                weight=row.weight,
                before=before,
                after=after,
            )
        )

    def _shut_door(self, name: str) -> None:
        self._owner.shut(f"tenant-{name}")
        token = self._open.pop(name, None)
        self._quotas.pop(name, None)
        if token is not None:
            token.close()


class _Absent(Exception):
    """The token is gone already: a destruction that goes on after a crash finds it so."""


@contextlib.contextmanager
def _token_if_there(base: TokenLocation, location: TokenLocation) -> Iterator[LocalToken]:
    """The token. Raises _Absent only where the module lists none: a PIN that is missing says nothing about the keys."""
    assert location.label is not None
    assert location.pin_file is not None
    if not is_listed(base, location.label):
        raise _Absent
    if not location.pin_file.exists():
        raise Unavailable(
            "tenant.unseen",
            "the tenant's token is there and cannot be looked into: its PIN file is gone",
            expected=location.pin_file,
            got=location.label,
            remedy="put the PIN file back, or remove the token with the module's own tool; then destroy the tenant again",
        )
    with open_token(location, lanes=1) as token:
        yield token


def verify_destroyed(data: bytes, identity: keys.PublicKey) -> DestructionRecord:
    """The record of a destruction, signed by this HSM identity. Raises Malformed or NotAuthentic."""
    return schema.decode(DestructionRecord, cose.verify(cose.parse(PROOF_PURPOSE, data, max_bytes=4096), identity))
