"""The state machine: `apply(state, transaction, block) -> writes and events, or Rejected(code)`.

Deterministic by construction: no clock, network, locale, randomness or hash order; certificates are judged at block time.
The order of judgement, whose first failure is the answer:
  1. the transaction is well-formed, of this ledger, and may still stand in this block;
  2. its nonce was never applied for its sender;
  3. its sender is on the ledger and active, and its key signed;
  4. the rule of its kind passes (ledger.admission, ledger.registration).
Nothing is written unless all pass.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import cast

from moorline.errors import Conflict, Malformed, MoorlineError, NotAuthentic, Refused, from_problem
from moorline.ledger import admission, issuance, registration, transactions
from moorline.ledger import genesis as genesis_module
from moorline.ledger import records as r
from moorline.ledger.draft import BlockContext, Draft, Event, View
from moorline.ledger.genesis import Genesis
from moorline.ledger.nonces import Nonces
from moorline.ledger.transactions import Payload, SenderKind, Transaction
from moorline.ledger.tree import Tree
from moorline.ledger.verified import Verified
from moorline.wire import cose, keys


@dataclass(frozen=True, slots=True, kw_only=True)
class Applied:
    """A transaction that passed. `nonce_id` and `valid_until` are what must be remembered of it."""

    id: bytes
    nonce_id: bytes
    valid_until: int
    writes: Mapping[str, bytes]
    events: tuple[Event, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rejected:
    """A transaction that did not, with its stable code (`ledger.*`, `conditions.*`); it leaves no trace in the state."""

    code: str
    problem: Mapping[str, str | float]

    def error(self) -> MoorlineError:
        """As an error to raise."""
        return from_problem(dict(self.problem))


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """Everything after one block. Immutable: a block makes a new one (`execute`)."""

    ledger_id: bytes
    height: int
    time_ms: int
    tree: Tree = field(repr=False)
    nonces: Nonces = field(repr=False)

    @property
    def root(self) -> bytes:
        """The state root."""
        return self.tree.root

    @property
    def records(self) -> Mapping[str, bytes]:
        """Every key with its value. To walk through all of them reads all of them, wherever they are stored."""
        return self.tree

    def get(self, key: str) -> bytes | None:
        """The value under `key`, or None."""
        return self.tree.value(key)

    def nonce_used(self, nonce_id: bytes) -> bool:
        """True if a transaction with this nonce id was applied and could still be valid."""
        return nonce_id in self.nonces

    def authority_set(self) -> dict[str, bytes]:
        """Names and raw checkpoint keys of the authorities in force after this block."""
        index = r.parse(r.IndexRecord, self.records[r.AUTHORITIES_INDEX])
        found = (r.parse(r.AuthorityRecord, self.records[r.authority_key(name)]) for name in index.holders)
        return {record.name: record.checkpoint_key for record in found}

    def parameter(self, name: str) -> int:
        """A parameter that is known to exist."""
        return r.parse(r.ParameterRecord, self.records[r.parameter_key(name)]).value


@dataclass(frozen=True, slots=True, kw_only=True)
class Executed:
    """A block's worth: the state after it and what came of each transaction, in order."""

    state: State
    outcomes: tuple[Applied | Rejected, ...]


def initial(genesis: Genesis) -> State:
    """The state of block 0."""
    return restored(
        ledger_id=genesis.ledger_id,
        height=0,
        time_ms=genesis.time_ms,
        records=genesis_module.initial_records(genesis),
        nonces={},
    )


def restored(
    *, ledger_id: bytes, height: int, time_ms: int, records: Mapping[str, bytes], nonces: Mapping[bytes, int]
) -> State:
    """A state from its parts. Whether it is the right one shows in its root."""
    return State(
        ledger_id=ledger_id,
        height=height,
        time_ms=time_ms,
        tree=Tree().updated(records),
        nonces=Nonces.of(nonces, height=height),
    )


def execute(state: State, batch: Sequence[bytes], *, time_ms: int, verified: Verified | None = None) -> Executed:
    """The state after a block of these transactions at this time. Rejected ones leave no trace; see `outcomes`.

    `verified` spares what was read and held before; it changes no outcome.
    """
    names = r.parse(r.IndexRecord, state.records[r.AUTHORITIES_INDEX]).holders
    block = BlockContext(height=state.height + 1, time_ms=time_ms, authorities=names)
    working = _Working(state)
    outcomes = tuple(
        working.take(apply(working, data, ledger_id=state.ledger_id, block=block, verified=verified)) for data in batch
    )
    after = State(
        ledger_id=state.ledger_id,
        height=block.height,
        time_ms=time_ms,
        tree=state.tree.updated(working.writes),
        nonces=state.nonces.after(block.height, working.nonces),
    )
    return Executed(state=after, outcomes=outcomes)


def apply(
    view: View, data: bytes, *, ledger_id: bytes, block: BlockContext, verified: Verified | None = None
) -> Applied | Rejected:
    """What this transaction does in this block. Total: any bytes give an answer. Numbers are those of the docstring."""
    draft = Draft(view=view, ledger_id=ledger_id, block=block, verified=verified)
    try:
        transaction = transactions.parse(data) if verified is None else verified.parse(data)  # 1
        _in_time(transaction.payload, draft)
        if view.nonce_used(transaction.nonce_id):  # 2
            raise Conflict("ledger.nonce_used", "this transaction, or another with its nonce, was applied already")
        if transaction.payload.sender.kind is SenderKind.AUTHORITY:
            _by_authority(draft, transaction)
        else:
            _by_provider(draft, transaction)
    except MoorlineError as error:
        return _rejected(error)
    return Applied(
        id=transaction.id,
        nonce_id=transaction.nonce_id,
        valid_until=transaction.payload.valid_until,
        writes=draft.writes,
        events=tuple(draft.events),
    )


def _in_time(payload: Payload, draft: Draft) -> None:
    ledger_id, block = draft.ledger_id, draft.block
    if payload.ledger_id != ledger_id:
        raise Refused(
            "ledger.other_ledger", "the transaction is for another ledger", expected=ledger_id, got=payload.ledger_id
        )
    last = block.height + draft.limit("valid_blocks")
    if payload.valid_until < block.height:
        raise Refused(
            "ledger.expired", "the transaction's last block has passed", expected=block.height, got=payload.valid_until
        )
    if payload.valid_until > last:
        raise Refused(
            "ledger.valid_too_long", "the transaction is valid for too long", expected=last, got=payload.valid_until
        )


def _by_authority(draft: Draft, transaction: Transaction) -> None:
    name = transaction.payload.sender.name
    record = draft.read(r.AuthorityRecord, r.authority_key(name))
    if record is None or record.status is not r.Status.ACTIVE or name not in draft.block.authorities:  # 3
        raise Refused("ledger.authority_unknown", "the sender is no authority in force", got=name)
    _signed_by(draft, transaction, (record.transaction_key,))
    body = transaction.body  # 4
    if isinstance(body, transactions.Propose):
        admission.propose(draft, name, body, transaction)
    elif isinstance(body, transactions.Approve):
        admission.approve(draft, name, body)


def _by_provider(draft: Draft, transaction: Transaction) -> None:
    sender = transaction.payload.sender
    name, _, hsm_id = sender.name.partition("/")
    provider = draft.read(r.ProviderRecord, r.provider_key(name))
    if provider is None or provider.status is r.Status.REMOVED:  # 3
        raise Refused("ledger.provider_unknown", "the sender is no provider of this ledger", got=name)
    if provider.status is not r.Status.ACTIVE:
        raise Refused("ledger.provider_suspended", "the provider is suspended", got=name)
    body = transaction.body
    if sender.kind is SenderKind.HSM:
        _by_hsm(draft, transaction, provider, hsm_id)
    else:
        _signed_by(draft, transaction, _ca_keys(provider, draft))
    registration.perform(draft, provider, cast("transactions.ProviderBody", body))  # 4


def _by_hsm(draft: Draft, transaction: Transaction, provider: r.ProviderRecord, hsm_id: str) -> None:
    hsm = draft.read(r.HsmRecord, r.hsm_key(provider.name, hsm_id))
    if hsm is None or hsm.status is not r.Status.ACTIVE:
        raise Refused("ledger.hsm_unknown", "the sender is no active HSM of this provider", got=hsm_id)
    _signed_by(draft, transaction, (hsm.signing_public,))
    body = transaction.body
    revokes = isinstance(body, transactions.Revoke) and body.kind in registration.HSM_REVOKES
    anchors = isinstance(body, transactions.AnchorLog) and (body.log == hsm_id or body.log.startswith(r.PAIR_LOGS))
    if not (revokes or anchors):
        raise Refused(
            "ledger.not_for_hsm",
            "this takes the provider's key",
            expected="revocation of instances, devices, hosts, launchers, certificates; anchor of its own log or of a pair",
            got=transaction.payload.kind,
        )


def _ca_keys(provider: r.ProviderRecord, draft: Draft) -> tuple[bytes, ...]:
    ders = provider.ca_certificates_at(draft.block.at)
    return tuple(map(_key_of, ders))


@lru_cache(maxsize=1024)  # bounded: one entry a CA certificate that signs transactions
def _key_of(der: bytes) -> bytes:
    return keys.public_bytes(issuance.public_key(issuance.parse(der)))


@lru_cache(maxsize=4096)  # bounded: one entry a key that signs transactions
def _verifying_key(spki: bytes) -> cose.VerifyingKey:
    return cose.verifying_key(keys.parse_public(spki))


def signing_key(view: View, transaction: Transaction) -> cose.VerifyingKey | None:
    """The key of its sender that a transaction names; None if the ledger has no such key now.

    For who verifies signatures beforehand (`Verified`). It says nothing about whether the sender may sign at all.
    """
    sender = transaction.payload.sender
    name, _, hsm_id = sender.name.partition("/")
    for spki in _registered_keys(view, sender.kind, name, hsm_id):
        key = _verifying_key(spki)
        if key.id == transaction.sign1.key_id:
            return key
    return None


def _registered_keys(view: View, kind: SenderKind, name: str, hsm_id: str) -> tuple[bytes, ...]:
    if kind is SenderKind.AUTHORITY:
        authority = view.get(r.authority_key(name))
        return () if authority is None else (r.parse(r.AuthorityRecord, authority).transaction_key,)
    if kind is SenderKind.HSM:
        hsm = view.get(r.hsm_key(name, hsm_id))
        return () if hsm is None else (r.parse(r.HsmRecord, hsm).signing_public,)
    provider = view.get(r.provider_key(name))
    return () if provider is None else tuple(map(_key_of, r.parse(r.ProviderRecord, provider).ca_certificates))


def _signed_by(draft: Draft, transaction: Transaction, allowed: tuple[bytes, ...]) -> None:
    for spki in allowed:
        key = _verifying_key(spki)
        if key.id != transaction.sign1.key_id:
            continue
        try:
            if draft.verified is None:
                cose.verify(transaction.sign1, key)
            else:
                draft.verified.verify(transaction.sign1, key)
        except NotAuthentic as error:
            raise NotAuthentic("ledger.signature_invalid", "the signature does not hold", got=error.code) from None
        return
    raise NotAuthentic("ledger.key_unknown", "no key of the sender made this signature", got=transaction.payload.sender.name)


def _rejected(error: MoorlineError) -> Rejected:
    if not error.code.startswith(("ledger.", "conditions.")):  # whatever a parser below found
        error = Malformed("ledger.transaction_malformed", error.says, expected=error.expected, got=error.code)
    return Rejected(code=error.code, problem=error.as_problem())


class _Working:
    """A state with the writes of the block so far. What was found once is kept: many read their sender's record."""

    def __init__(self, state: State) -> None:
        self._state = state
        self._found: dict[str, bytes] = {}
        self.writes: dict[str, bytes] = {}
        self.nonces: dict[bytes, int] = {}

    def get(self, key: str) -> bytes | None:
        found = self.writes.get(key) or self._found.get(key)  # no value is empty
        if found is None:
            found = self._state.get(key)
            if found is not None:
                self._found[key] = found
        return found

    def nonce_used(self, nonce_id: bytes) -> bool:
        return nonce_id in self.nonces or self._state.nonce_used(nonce_id)

    def take(self, outcome: Applied | Rejected) -> Applied | Rejected:
        if isinstance(outcome, Applied):
            self.writes.update(outcome.writes)
            self.nonces[outcome.nonce_id] = outcome.valid_until
        return outcome
