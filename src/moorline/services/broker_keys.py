"""The broker's long-lived keys through their lives: begun, activated, retired, and destroyed when a quorum approved.

| role | begun | activated when | retires |
|---|---|---|---|
| `wrapping` | made in the token | at once | when a pass found nothing sealed under it, 120 s at the earliest |
| `issuing-ca` | made; the provider certifies it | the ledger has it as an active issuing CA | after the longest leaf, 1 h |
| `hsm-identity` | made; the provider certifies it | the ledger has it in this HSM's record (RotateHsm) | after 1 h |
| `hsm-kem` | made | the ledger has it in this HSM's record (RotateHsm) | after 1 h |
| `verifier` | made; relying parties are told of it | by command, when they were | after the longest result, 1 h |

A change is recorded first, and taken by every process of this HSM from the record (broker_following), this one included.

Launch keys have epochs instead (hsm.launch_keys): opened, closed with grace, destroyed by themselves.
"""

from __future__ import annotations

import asyncio
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import serialization

from moorline.clock import Instant
from moorline.digest import same
from moorline.errors import Malformed, Misconfigured, Refused
from moorline.hsm import approvals, lifecycle
from moorline.hsm.approvals import Approval, Operation, Request
from moorline.hsm.backup import FILE_CAP
from moorline.hsm.custody import Circle, Locked
from moorline.hsm.issuing import require_fits
from moorline.hsm.keys import HSM_IDENTITY, ISSUING_CA, KEM, VERIFIER, WRAPPING, point_key
from moorline.hsm.lifecycle import State
from moorline.hsm.rotation import OVERLAP_S, Pass, require_done, rewrap
from moorline.hsm.token import RemoteToken
from moorline.ledger import standing
from moorline.services.broker import Broker
from moorline.services.broker_following import follow
from moorline.services.broker_peers import common_name
from moorline.storage.hsm_store import KeyRow
from moorline.storage.sealed_rows import SealedRows
from moorline.storage.steps import reached
from moorline.wire import certificates, keys, schema

ROTATABLE: Final = (WRAPPING, ISSUING_CA, HSM_IDENTITY, VERIFIER, KEM)


def adopt_keys(broker: Broker) -> None:
    """Keep account of keys that were there before anybody did: each role has an active key."""
    now = broker.clock.now()
    known = {row.role for row in broker.hsm.key_rows()}
    held = {ISSUING_CA: broker.ca.chain[0], HSM_IDENTITY: broker.identity.chain[0]}
    fresh = tuple(lifecycle.adopted(role, role, now, held.get(role)) for role in ROTATABLE if role not in known)
    if fresh:
        broker.hsm.put_keys(fresh)
        follow(broker)


def begin(broker: Broker, role: str) -> tuple[KeyRow, bytes]:
    """A new pre-active key of a role, in the token; and its public half (DER), empty for a wrapping key.

    One that was begun before and waits is given again: who was interrupted asks once more, and two who ask at once get the
    same key. A wrapping key is activated at once. Raises Malformed("key.role").
    """
    if role not in ROTATABLE:
        raise Malformed("key.role", "keys of this role are not rotated here", expected=", ".join(ROTATABLE), got=role)
    now = broker.clock.now()
    row = _waiting(broker, role) or lifecycle.begun(broker.hsm.key_rows(), role, now)
    # Intent before effect: who died behind this line finds the row, and goes on from it.
    broker.hsm.put_keys((row,))
    _make(broker, row)
    reached("hsm.key.made")
    if role == WRAPPING:
        changed = lifecycle.activated(broker.hsm.key_rows(), row.label, now, overlap_s=OVERLAP_S)
        broker.hsm.put_keys(changed)
        follow(broker)
        _log(broker, "key-activated", row.label, now)
        return changed[-1], b""
    point = broker.token.ec_point(row.label)
    broker.verifier.follow(broker.hsm.key_rows())
    _log(broker, "key-begun", row.label, now)
    return row, point if role == KEM else keys.public_bytes(point_key(point))


def _make(broker: Broker, row: KeyRow) -> None:
    """Make a row's key in the token, recoverable as the active one is; it may be there already."""
    recoverable = any(each.label == _active(broker, row.role) and each.trust_needed for each in broker.token.inspect())
    try:
        if row.role == WRAPPING:
            broker.token.generate_wrapping_key(row.label, recoverable=recoverable)
        else:
            broker.token.generate_ec_key(row.label, derive=row.role == KEM, recoverable=recoverable)
    except Misconfigured as error:
        if error.code != "token.key_exists":
            raise


async def activate(broker: Broker, label: str, pem: str | None = None) -> KeyRow:
    """Use a begun key from now on. What the ledger must know of it, it knows already.

    `pem` is the certificate of an issuing CA or HSM identity. Raises `ledger.*`, `issuing.*`, `key.*`.
    """
    role = label.split("@", maxsplit=1)[0]
    if role in (ISSUING_CA, HSM_IDENTITY):
        der: bytes | None = _der(pem)
        await _require_registered(broker, role, label, der or b"")
    elif pem is None and role in (KEM, VERIFIER):
        der = None
        if role == KEM:
            await _require_kem_registered(broker, label)
    else:
        raise Malformed("key.role", "keys of this role are not activated by a certificate", got=label)
    return await asyncio.to_thread(_activated, broker, label, der)


def _activated(broker: Broker, label: str, der: bytes | None) -> KeyRow:
    now = broker.clock.now()
    changed = lifecycle.activated(broker.hsm.key_rows(), label, now, overlap_s=certificates.LEAF_MAX_LIFE_S, certificate=der)
    if der is not None:
        require_fits(broker.token, label, x509.load_der_x509_certificate(der))
    elif not broker.token.has_key(label):
        raise Refused("key.not_made", "the token does not have this key", got=label, remedy="moor hsm key rotate again")
    broker.hsm.put_keys(changed)
    follow(broker)
    _log(broker, "key-activated", label, now)
    return changed[-1]


def _der(pem: str | None) -> bytes:
    try:
        certificate = x509.load_pem_x509_certificate((pem or "").encode("ascii"))
    except ValueError:
        raise Malformed("key.certificate", "this is no certificate in PEM") from None
    return certificate.public_bytes(serialization.Encoding.DER)


async def _require_registered(broker: Broker, role: str, label: str, der: bytes) -> None:
    """Raises Refused("key.not_registered") unless the ledger has exactly this certificate for the role."""
    provider, hsm = broker.settings.provider, broker.settings.hsm
    if role == ISSUING_CA:
        name = common_name(der)
        state = await broker.ledger.state(standing.issuing_ca_keys(provider, name))
        recorded = standing.active_issuing_ca(state, provider, name).certificate
    else:
        state = await broker.ledger.state(standing.hsm_keys(provider, hsm))
        recorded = standing.active_hsm(state, provider, hsm).certificate
    if not same(recorded, der):
        raise _not_registered(label)


async def _require_kem_registered(broker: Broker, label: str) -> None:
    provider, hsm = broker.settings.provider, broker.settings.hsm
    state = await broker.ledger.state(standing.hsm_keys(provider, hsm))
    recorded = standing.active_hsm(state, provider, hsm).kem_public
    if not same(recorded, await asyncio.to_thread(broker.token.ec_point, label)):
        raise _not_registered(label)


def _not_registered(label: str) -> Refused:
    return Refused("key.not_registered", "the ledger has another key for this", got=label, remedy="register it first")


def rewrap_now(broker: Broker) -> Pass:
    """One pass over everything sealed."""
    return rewrap(broker.token, SealedRows(broker.store), provider=broker.settings.provider)


def retire(broker: Broker, label: str) -> KeyRow:
    """End a retiring key's use. A wrapping key must have nothing under it. Raises `key.*`."""
    now = broker.clock.now()
    row = lifecycle.retired(broker.hsm.key_rows(), label, now)
    if row.role == WRAPPING:
        require_done(rewrap_now(broker), label, now)
    broker.hsm.put_keys((row,))
    follow(broker)
    _log(broker, "key-retired", label, now)
    return row


def destroy(broker: Broker, label: str, request: bytes) -> KeyRow:
    """Destroy a retired or never active key, for which a quorum approved this request. Raises `approval.*`, `key.*`."""
    now = broker.clock.now()
    row = lifecycle.destroyed(broker.hsm.key_rows(), label, now)
    use(broker, request, Operation.KEY_DESTROY, label)
    if isinstance(broker.token.inner, RemoteToken):
        broker.token.inner.destroy_granted(label, _grant(broker, request))
    elif row.role == WRAPPING:
        broker.token.destroy_secret(label)
    else:
        broker.token.destroy_key(label)
    if broker.token.has_secret(label) or broker.token.has_key(label):
        raise Refused("key.not_destroyed", "the token still shows the key", got=label, remedy="ask anew, and see the token")
    broker.hsm.put_keys((row,))
    _log(broker, "key-destroyed", label, now)
    return row


def _grant(broker: Broker, request: bytes) -> bytes:
    """What the token's owner verifies once more: it does not take the broker's word for a quorum."""
    signed = tuple(each for _, _, each in broker.hsm.approvals(request))
    return schema.encode(approvals.Grant(request=request_of(broker, request), signed=signed))


# -- approvals
# ------------------------------------------------------------------------------------------------------------------


def circle(broker: Broker) -> Circle:
    """Whose approval counts here. Raises Misconfigured("approval.no_custodians")."""
    path = broker.settings.custody
    if path is None or not path.exists():
        raise Misconfigured(
            "approval.no_custodians",
            "this HSM has no custodians; nothing that destroys is done here",
            expected=path,
            remedy="set custody in broker.toml to the custody.cbor beside the token",
        )
    return schema.decode(Locked, path.read_bytes(), max_bytes=FILE_CAP).circle


def ask(broker: Broker, operation: Operation, target: str) -> Request:
    """A new request for custodians."""
    circle(broker)
    asked = approvals.request(
        provider=broker.settings.provider,
        hsm=broker.settings.hsm,
        operation=operation,
        target=target,
        now=broker.clock.now(),
        random=broker.token.random(16),
    )
    broker.hsm.add_request(asked.id, schema.encode(asked))
    return asked


def ask_to_destroy(broker: Broker, label: str) -> Request:
    """A new request about a key. Raises `key.*` for one that could not be destroyed: custodians are not asked in vain."""
    lifecycle.destroyed(broker.hsm.key_rows(), label, broker.clock.now())
    return ask(broker, Operation.KEY_DESTROY, label)


def take_approval(broker: Broker, identifier: bytes, signed: bytes) -> tuple[Request, int]:
    """Keep a custodian's approval; the request, and how many approved. Raises `approval.*`."""
    asked = request_of(broker, identifier)
    found = approvals.verify(asked, signed, circle(broker), broker.clock.now())
    broker.hsm.add_approval(identifier, found.custodian, found.at, signed)
    _log(broker, "approval", identifier.hex(), broker.clock.now())
    return asked, len(broker.hsm.approvals(identifier))


def request_of(broker: Broker, identifier: bytes) -> Request:
    """A request by its id. Raises Refused("approval.unknown")."""
    return schema.decode(Request, broker.hsm.request(identifier))


def use(broker: Broker, identifier: bytes, operation: Operation, target: str) -> None:
    """Use a request up, before its effect. Raises `approval.*` unless a quorum approved exactly this."""
    now = broker.clock.now()
    given = tuple(Approval(custodian=name, at=at, signed=signed) for name, at, signed in broker.hsm.approvals(identifier))
    approvals.require_granted(
        request_of(broker, identifier), given, circle(broker), operation=operation, target=target, now=now
    )
    broker.hsm.use_request(identifier, now)


def _waiting(broker: Broker, role: str) -> KeyRow | None:
    """A rotation that was begun: by somebody who was interrupted, or by somebody else."""
    return next((row for row in broker.hsm.key_rows(role) if row.state == State.PRE_ACTIVE), None)


def _active(broker: Broker, role: str) -> str:
    return next((row.label for row in broker.hsm.key_rows(role) if row.state == State.ACTIVE), role)


def _log(broker: Broker, event: str, label: str, now: Instant) -> None:
    with broker.store.transaction() as c:
        broker.store.append_in(c, now, event, {"key": label})
