"""What must be remembered about an HSM beside its token: states of keys, approvals, tenants and each tenant's own log.

One durable transaction a method (ADR 0004). The store keeps what `hsm.lifecycle`, `hsm.approvals` and `hsm.tenants`
decided; the only decision made here is what a database alone can make: a name, an approval or a use that is there already.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError

from moorline.audit.log import encode_entry, entry_digest, first_head
from moorline.clock import Instant
from moorline.errors import Conflict, Refused
from moorline.storage.database import open_database
from moorline.storage.steps import reached
from moorline.storage.transactions import reading, writing


def _table(name: str, *columns: str) -> sa.TableClause:
    return sa.table(name, *(sa.column(column) for column in columns))


_KEYS: Final = _table(
    "hsm_keys",
    *("label", "role", "state", "created", "active", "retiring", "retire_after", "retired", "destroyed", "certificate"),
)
_REQUESTS: Final = _table("hsm_requests", "id", "data", "used")
_APPROVALS: Final = _table("hsm_approvals", "request", "custodian", "at", "signed")
_TENANTS: Final = _table(
    "hsm_tenants",
    *("name", "token", "state", "uid", "weight", "keys", "operations", "created", "changed", "proof"),
)
_LOG: Final = _table("hsm_tenant_log", "tenant", "number", "data")
_FACTS: Final = _table("hsm_facts", "name", "value")
_KEY_CHANGES: Final = sa.select(_FACTS.c.value).where(_FACTS.c.name == "key-changes")


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyRow:
    """A key and the moments its states began; None: not yet. `certificate` is DER."""

    label: str
    role: str
    state: str
    created: int
    active: int | None = None
    retiring: int | None = None
    retire_after: int | None = None
    retired: int | None = None
    destroyed: int | None = None
    certificate: bytes | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TenantRow:
    """A tenant of a virtual HSM. `token` is the label of its token, `keys` and `operations` (a minute) are its quotas."""

    name: str
    token: str
    state: str
    uid: int
    weight: int
    keys: int
    operations: int
    created: int
    changed: int
    proof: bytes | None = None


class HsmStore:
    """The durable state of one HSM. Safe for threads and, on one database, for several processes."""

    def __init__(self, engine: sa.Engine) -> None:
        self._engine = engine

    @classmethod
    def open(cls, url: str) -> HsmStore:
        """The store at `url`, migrated to its newest schema; it can share a database with the broker's."""
        return cls(open_database(url, "hsm"))

    def close(self) -> None:
        """Give the connections back."""
        self._engine.dispose()

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[sa.Connection]:
        try:
            with writing(self._engine) as connection:
                yield connection
        except IntegrityError:
            raise Conflict("hsm.already_there", "this is recorded already", remedy="read it, and go on from there") from None

    def _reading(self) -> contextlib.AbstractContextManager[sa.Connection]:
        # No lock: the broker seals and unseals within a transaction of its own on the same database.
        return reading(self._engine)

    # -- keys -------------------------------------------------------------------------------------------------------------

    def key_rows(self, role: str | None = None) -> tuple[KeyRow, ...]:
        """All keys (of a role), oldest first."""
        query = sa.select(_KEYS).order_by(_KEYS.c.created, _KEYS.c.label)
        with self._reading() as c:
            rows = c.execute(query if role is None else query.where(_KEYS.c.role == role))
            return tuple(KeyRow(**row._mapping) for row in rows)  # noqa: SLF001 - SQLAlchemy's public name for it

    def put_keys(self, rows: tuple[KeyRow, ...]) -> None:
        """Record the states of several keys together: a rotation moves two at once."""
        with self._transaction() as c:
            for row in rows:
                c.execute(sa.delete(_KEYS).where(_KEYS.c.label == row.label))
                c.execute(sa.insert(_KEYS).values(**asdict(row)))
            c.execute(sa.update(_FACTS).where(_FACTS.c.name == "key-changes").values(value=_FACTS.c.value + 1))
        reached("hsm.keys.recorded")

    def key_changes(self) -> int:
        """A number that rises with every change to a key, whichever process made it."""
        with self._reading() as c:
            return int(c.execute(_KEY_CHANGES).scalar_one())

    def take_turn(self, name: str, now: Instant, for_s: int) -> bool:
        """Whether this process may act now: nobody else may for so many seconds. Who took it before waits as others do."""
        with self._transaction() as c:
            taken = c.execute(
                sa.update(_FACTS).where(_FACTS.c.name == name, _FACTS.c.value <= now).values(value=now + for_s)
            )
            return taken.rowcount == 1

    # -- approvals ----------------------------------------------------------------------------------------------------------

    def add_request(self, identifier: bytes, data: bytes) -> None:
        """A new request. Raises Conflict."""
        with self._transaction() as c:
            c.execute(sa.insert(_REQUESTS).values(id=identifier, data=data, used=None))

    def request(self, identifier: bytes) -> bytes:
        """An encoded request. Raises Refused("approval.unknown")."""
        with self._reading() as c:
            row = c.execute(sa.select(_REQUESTS).where(_REQUESTS.c.id == identifier)).one_or_none()
        if row is None:
            raise Refused("approval.unknown", "there is no such request", got=identifier, remedy="moor hsm requests")
        return bytes(row.data)

    def requests(self) -> tuple[tuple[bytes, int | None], ...]:
        """All encoded requests, and when each was used."""
        with self._reading() as c:
            return tuple((bytes(row.data), row.used) for row in c.execute(sa.select(_REQUESTS)))

    def add_approval(self, identifier: bytes, custodian: str, at: int, signed: bytes) -> None:
        """An approval that was verified. Raises Conflict if this custodian approved before."""
        with self._transaction() as c:
            c.execute(sa.insert(_APPROVALS).values(request=identifier, custodian=custodian, at=at, signed=signed))
        reached("hsm.approval.recorded")

    def approvals(self, identifier: bytes) -> tuple[tuple[str, int, bytes], ...]:
        """Custodian, moment and signature of each approval of a request."""
        query = sa.select(_APPROVALS).where(_APPROVALS.c.request == identifier).order_by(_APPROVALS.c.custodian)
        with self._reading() as c:
            return tuple((row.custodian, row.at, bytes(row.signed)) for row in c.execute(query))

    def use_request(self, identifier: bytes, at: Instant) -> None:
        """Mark a request as used, before its effect. Raises Conflict("approval.used")."""
        with self._transaction() as c:
            marked = c.execute(
                sa.update(_REQUESTS).where(_REQUESTS.c.id == identifier, _REQUESTS.c.used.is_(None)).values(used=at)
            )
            if marked.rowcount != 1:
                raise Conflict("approval.used", "an approval is used once", got=identifier, remedy="ask anew")
        reached("hsm.request.used")

    # -- tenants ----------------------------------------------------------------------------------------------------------

    def tenants(self) -> tuple[TenantRow, ...]:
        """All tenants, also destroyed ones, by name."""
        with self._reading() as c:
            rows = c.execute(sa.select(_TENANTS).order_by(_TENANTS.c.name))
            return tuple(TenantRow(**row._mapping) for row in rows)  # noqa: SLF001 - as above

    def add_tenant(self, row: TenantRow) -> None:
        """Intend a new tenant. Raises Conflict if there is, or was, one of this name."""
        with self._transaction() as c:
            c.execute(sa.insert(_TENANTS).values(**asdict(row)))
        reached("hsm.tenant.intended")

    def move_tenant(self, name: str, state: str, at: Instant, *, proof: bytes | None = None) -> None:
        """A tenant's next state."""
        with self._transaction() as c:
            values: dict[str, Any] = {"state": state, "changed": at} | ({} if proof is None else {"proof": proof})
            c.execute(sa.update(_TENANTS).where(_TENANTS.c.name == name).values(**values))
        reached("hsm.tenant.moved")

    def forget_tenant(self, name: str) -> None:
        """A tenant that never came to be leaves no trace."""
        with self._transaction() as c:
            c.execute(sa.delete(_LOG).where(_LOG.c.tenant == name))
            c.execute(sa.delete(_TENANTS).where(_TENANTS.c.name == name))

    def log(self, tenant: str, *, at: Instant, event: str, body: Mapping[str, str]) -> int:
        """An entry in a tenant's own log, numbered and chained for itself; its number."""
        with self._transaction() as c:
            last = c.execute(
                sa.select(_LOG).where(_LOG.c.tenant == tenant).order_by(_LOG.c.number.desc()).limit(1)
            ).one_or_none()
            number = 0 if last is None else int(last.number) + 1
            data = encode_entry(
                number=number,
                previous=first_head("hsm-tenant") if last is None else entry_digest(bytes(last.data)),
                time=at,
                event=event,
                subject=next(iter(body.values()), ""),
                details=dict(body),
            )
            c.execute(sa.insert(_LOG).values(tenant=tenant, number=number, data=data))
        return number

    def tenant_log_end(self, tenant: str) -> tuple[int, bytes | None]:
        """How many entries a tenant's log has, and the last one."""
        query = sa.select(_LOG).where(_LOG.c.tenant == tenant).order_by(_LOG.c.number.desc()).limit(1)
        with self._reading() as c:
            last = c.execute(query).one_or_none()
        return (0, None) if last is None else (int(last.number) + 1, bytes(last.data))

    def tenant_log_entry(self, tenant: str, number: int) -> bytes | None:
        """One entry of a tenant's log; None if it is not there."""
        query = sa.select(_LOG.c.data).where(_LOG.c.tenant == tenant, _LOG.c.number == number)
        with self._reading() as c:
            data = c.execute(query).scalar()
        return None if data is None else bytes(data)

    def tenant_log(self, tenant: str) -> tuple[bytes, ...]:
        """A tenant's log, in order."""
        query = sa.select(_LOG.c.data).where(_LOG.c.tenant == tenant).order_by(_LOG.c.number)
        with self._reading() as c:
            return tuple(bytes(row.data) for row in c.execute(query))
