"""Launches, each used up once: what the transaction that consumes one does, and the one that confirms it.

Consumption marks the launch and both key digests, takes the pool entry, begins the generation and writes the audit entry
(PROTOCOLS.md 3). No transaction begins or ends here.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, Final

import sqlalchemy as sa

from moorline.clock import Instant
from moorline.errors import Conflict, MoorlineError, Refused, Unavailable
from moorline.storage import broker_certificates as certificates
from moorline.storage import broker_epochs as epochs
from moorline.storage import broker_facts as facts
from moorline.storage import broker_generations as generations
from moorline.storage import broker_pool as pool
from moorline.storage.broker_certificates import Issued
from moorline.storage.broker_generations import Generation
from moorline.storage.broker_pool import PoolEntry, Taken

CONSUMED: Final = "consumed"
CONFIRMED: Final = "confirmed"

Advance = Callable[[sa.Connection], object]
"""Moves the token's counter and this database's record of it, in the transaction it is given."""

LAUNCHES: Final = sa.table(
    "launches",
    *(sa.column(name) for name in ("launcher", "epoch", "sequence", "kem_digest", "signing_digest", "session")),
    *(sa.column(name) for name in ("service", "profile", "tenant", "instance", "generation", "host")),
    *(sa.column(name) for name in ("public", "wrapped", "state", "at")),
)
INSTANCES: Final = sa.table("instances", *(sa.column(name) for name in ("instance", "service", "generation")))
_SAME: Final = (
    LAUNCHES.c.launcher == sa.bindparam("by"),
    LAUNCHES.c.epoch == sa.bindparam("in"),
    LAUNCHES.c.sequence == sa.bindparam("number"),
)
_SAME_SIGNER: Final = (*_SAME, LAUNCHES.c.signing_digest == sa.bindparam("signing"))
_FIND: Final = sa.select(LAUNCHES).where(*_SAME)
_FIND_SIGNER: Final = sa.select(LAUNCHES).where(*_SAME_SIGNER)
_OF_KEYS: Final = sa.select(LAUNCHES.c.session).where(
    sa.or_(LAUNCHES.c.kem_digest == sa.bindparam("kem"), LAUNCHES.c.signing_digest == sa.bindparam("signing"))
)
_KEEP: Final = sa.insert(LAUNCHES)
_CONFIRM: Final = sa.update(LAUNCHES).where(*_SAME_SIGNER).values(state=CONFIRMED, wrapped=None)
_FIND_INSTANCE: Final = sa.select(INSTANCES).where(INSTANCES.c.instance == sa.bindparam("of"))
_INSTANCES_OF_THESE: Final = sa.select(INSTANCES.c.instance).where(
    INSTANCES.c.instance.in_(sa.bindparam("these", expanding=True))
)
_FORGET_INSTANCE: Final = sa.delete(INSTANCES).where(INSTANCES.c.instance == sa.bindparam("of"))
_KEEP_INSTANCE: Final = sa.insert(INSTANCES)


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """One launch that asks to be consumed. The digests are SHA-256 of the session keys; `session` names it for people."""

    launcher: bytes
    epoch: int
    sequence: int
    kem_digest: bytes
    signing_digest: bytes
    session: str
    service: str
    profile: str
    tenant: str
    instance: str
    generation: int
    host: str


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchRow:
    """A launch as recorded."""

    launch: Launch
    public: bytes
    state: str
    at: Instant


@dataclass(frozen=True, slots=True, kw_only=True)
class Fresh:
    """What a launch brings with it that only a new consumption uses (BrokerStore.consume says what each is)."""

    storage: bytes
    commitment: bytes
    verdicts_seen: int
    not_after: Instant
    advance: Advance
    host_result: bytes
    nonce: bytes


def latest(c: sa.Connection, limit: int) -> tuple[LaunchRow, ...]:
    """The latest launches."""
    query = sa.select(LAUNCHES).order_by(LAUNCHES.c.at.desc()).limit(limit)
    return tuple(_row(row) for row in c.execute(query).mappings())


def numbered(c: sa.Connection, *, launcher: bytes, epoch: int, sequence: int) -> tuple[LaunchRow, ...]:
    """The launch of one sequence number, if there was one."""
    found = c.execute(_FIND, {"by": launcher, "in": epoch, "number": sequence})
    return tuple(_row(row) for row in found.mappings())


def newest_generation(c: sa.Connection, instance: str) -> int | None:
    """The newest generation of an instance that was launched, or None."""
    row = c.execute(_FIND_INSTANCE, {"of": instance}).one_or_none()
    return None if row is None else int(row.generation)


def forget_key(c: sa.Connection, instance: str, generation: int) -> bool:
    """Drop the private key of a launch that was never confirmed; True if there was one."""
    where = (LAUNCHES.c.instance == instance, LAUNCHES.c.generation == generation, LAUNCHES.c.wrapped.is_not(None))
    return c.execute(sa.update(LAUNCHES).where(*where).values(wrapped=None)).rowcount > 0


def known_instances(c: sa.Connection, instances: Collection[str]) -> set[str]:
    """Those of these that were launched before."""
    return set(c.execute(_INSTANCES_OF_THESE, {"these": sorted(instances)}).scalars())


def keep(c: sa.Connection, taken: Sequence[tuple[Launch, PoolEntry, Instant]]) -> None:
    """Launches with the pool entries they took, and their instances' newest generations."""
    rows = [row_of(launch, entry, at) for launch, entry, at in taken]
    c.execute(_KEEP, rows)
    standing = [{name: row[name] for name in ("instance", "service", "generation")} for row in rows]
    c.execute(_KEEP_INSTANCE, standing)


def row_of(launch: Launch, pair: PoolEntry, at: Instant) -> dict[str, Any]:
    """The row of a launch that took this key pair."""
    named = {name: getattr(launch, name) for name in Launch.__dataclass_fields__}
    return {**named, "public": pair.public, "wrapped": pair.wrapped, "state": CONSUMED, "at": at}


def entry(launch: Launch, fresh: Fresh) -> dict[str, object]:
    """What the secure log says of a consumption."""
    return {
        "launcher": launch.launcher,
        "epoch": launch.epoch,
        "sequence": launch.sequence,
        "instance": launch.instance,
        "host": launch.host,
        "session": launch.session,
        "channel": launch.profile,
        "host_result": fresh.host_result,
    }


def generation_of(launch: Launch, fresh: Fresh, at: Instant) -> Generation:
    """The generation that a launch begins."""
    return Generation(
        instance=launch.instance,
        generation=launch.generation,
        service=launch.service,
        host=launch.host,
        state=generations.LIVE,
        code="",
        commitment=fresh.commitment,
        destroyed="",
        at=at,
    )


def consume(c: sa.Connection, launch: Launch, at: Instant, fresh: Fresh) -> Taken | MoorlineError:
    """Use a launch up, or say why not; alarms are kept either way, which is why a refusal is returned and not raised."""
    # 1. The same launch again: the same result for the same keys until confirmed, an alarm for anybody else.
    row = c.execute(_FIND, _named(launch)).one_or_none()
    if row is not None:
        return _again(c, launch, row, at, fresh.nonce)
    # 2. The keys of another launch: one attester, one launch.
    other = c.execute(_OF_KEYS, {"kem": launch.kem_digest, "signing": launch.signing_digest}).first()
    if other is not None:
        says = "session keys of one launch came with another"
        facts.alarm(c, at, "launch.key_reused", says, other.session, launch.session)
        return Refused("launch.key_reused", "these session keys belong to another launch")
    # 3. Lease, epoch and expiry as they stand now, not as they stood when the release was decided. 4. The host may have lost
    # its verdict since it was looked at. 5. Every relaunch raises the generation (PROTOCOLS.md 9).
    before = c.execute(_FIND_INSTANCE, {"of": launch.instance}).one_or_none()
    overtaken = _over(c, launch, at, fresh.not_after) or _overtaken(c, launch, before, fresh.verdicts_seen)
    if overtaken is not None:
        return overtaken
    # 6. Take, mark, log.
    taken = pool.take_one(c, launch.service, launch.profile)
    if taken is None:
        return Unavailable("launch.pool_empty", "no key pair is ready for this service", remedy="ask again shortly")
    if before is not None:
        fresh.advance(c)  # a generation change: a database from before it is behind the token's counter
        c.execute(_FORGET_INSTANCE, {"of": launch.instance})
    keep(c, [(launch, taken, at)])
    facts.append(c, at, "launch-consumed", entry(launch, fresh))
    _begin_generation(c, launch, at, fresh)
    return Taken(public=taken.public, wrapped=taken.wrapped, again=False, storage=fresh.storage)


def confirm(c: sa.Connection, launch: Launch, issued: Issued, at: Instant) -> Issued:
    """Record that the attester confirmed, and its certificate; of one that did before, the certificate it got.

    Raises Conflict("launch.not_consumed") or Refused (`renewal.*`).
    """
    signer = {**_named(launch), "signing": launch.signing_digest}
    row = c.execute(_FIND_SIGNER, signer).one_or_none()
    if row is None:
        raise Conflict("launch.not_consumed", "this session holds no launch that could be confirmed")
    generations.require_live(c, launch.instance, launch.generation)
    if row.state == CONFIRMED:
        return certificates.newest(c, issued.spiffe_id) or issued
    c.execute(_CONFIRM, signer)
    certificates.insert(c, issued)
    facts.append(c, at, "launch-confirmed", {"instance": launch.instance, "serial": issued.serial})
    return issued


def _row(row: Any) -> LaunchRow:  # noqa: ANN401 - a row of `launches`
    launch = Launch(**{name: row[name] for name in Launch.__dataclass_fields__})
    return LaunchRow(launch=launch, public=row["public"], state=row["state"], at=row["at"])


def _named(launch: Launch) -> dict[str, object]:
    """The parameters of _SAME."""
    return {"by": launch.launcher, "in": launch.epoch, "number": launch.sequence}


def _over(c: sa.Connection, launch: Launch, at: Instant, not_after: Instant) -> Refused | None:
    """By a time that no clock set back makes earlier, of this process or of another one."""
    now = facts.risen(c, at)
    if now > not_after:
        return Refused(
            "launch.expired", "the launch has expired", expected=f"<= {not_after}", got=now, remedy="launch again"
        )
    if epochs.leased(c, launcher=launch.launcher, epoch=launch.epoch, sequence=launch.sequence, at=now):
        return None
    return Refused(
        "launch.sequence_not_leased",
        "no standing lease covers this sequence number",
        got=launch.sequence,
        remedy="let the launcher ask for a new lease and launch again",
    )


def _overtaken(c: sa.Connection, launch: Launch, before: Any, verdicts_seen: int) -> Refused | None:  # noqa: ANN401 - a row
    if generations.lost_since(c, launch.host, verdicts_seen):
        return Refused("launch.host_not_standing", "the host lost its verdict just now", got=launch.host)
    newest = generations.newest(c, launch.instance)
    other = before is not None and before.service != launch.service
    if not other and (newest is None or launch.generation > newest):
        return None
    return Refused(
        "launch.generation_behind",
        "the instance was launched or retired in this generation or a later one, or is of another service",
        expected=f"{launch.service if before is None else before.service} > {newest}",
        got=f"{launch.service} {launch.generation}",
        remedy="launch it again in the next generation",
    )


def _begin_generation(c: sa.Connection, launch: Launch, at: Instant, fresh: Fresh) -> None:
    for earlier in generations.live_of(c, launch.instance):
        generations.end(c, earlier, state=generations.SUPERSEDED, code="renewal.generation_behind", at=at)
        body = {"instance": earlier.instance, "generation": earlier.generation, "code": "renewal.generation_behind"}
        facts.append(c, at, "instance-halted", {**body, "host": earlier.host})
    generations.begin_all(c, [(generation_of(launch, fresh, at), fresh.storage, fresh.nonce)])


def _again(c: sa.Connection, launch: Launch, row: Any, at: Instant, nonce: bytes) -> Taken | MoorlineError:  # noqa: ANN401 - a row
    same = row.kem_digest == launch.kem_digest and row.signing_digest == launch.signing_digest
    if same and row.state == CONSUMED and row.wrapped is not None:
        try:
            generations.require_live(c, launch.instance, launch.generation)
        except Refused as ended:
            return ended
        if nonce:
            generations.hold(c, launch.instance, launch.generation, nonce)
        storage = generations.storage_key(c, launch.instance, launch.generation)
        return Taken(public=row.public, wrapped=row.wrapped, again=True, storage=storage or b"")
    says = "a launch token was shown again" if same else "a launch token was shown by two sessions: a clone, or a theft"
    facts.alarm(c, at, "launch.token_consumed", says, row.session, launch.session)
    return Refused(
        "launch.token_consumed",
        "this launch token was used before",
        got=f"sequence {launch.sequence} of epoch {launch.epoch}",
        remedy="launch again; look at the alarms of the broker",
    )
