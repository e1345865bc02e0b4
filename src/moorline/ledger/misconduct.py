"""Evidence that is one thing, wrong by itself; anybody with the trust file verifies it (docs/spec/ledger-evidence.md). Pure.

    invalid-block        a header sealed by its maker, and a transaction under it that can never stand: no transaction, of
                         another ledger, or expired. The offender is the maker.
    wrong-execution      a header sealed by its maker, the block under it, and what that block touches of the state it begins
                         from: executed again it is another (ledger.re_execution). The maker.
    time-runs-back       a header sealed by its maker whose time is not later than that of the header it follows. The maker.
    duplicate-vote       two votes of a CometBFT validator that exclude each other. The validator.
    light-client-attack  two CometBFT headers of one height, both with a commit. Who signed both
                         (engines.cometbft.evidence).
    clock-off            a commit with a vote whose time is `CLOCK_OFF_S` or more from the median of all. Who cast it: its
                         clock is wrong, or it lies; the median, which is block time, stands against it.

Under CometBFT an application never sees the signature over a proposal: a block that does not apply is refused there, and
its proposer named in the log only. Censorship and silence sign nothing: nobody can be named from evidence.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Final

from moorline.audit import merkle
from moorline.digest import same
from moorline.errors import Malformed, Refused
from moorline.ledger import anchor, blocks, light_client, re_execution, seals, transactions
from moorline.ledger.anchor import CometAnchor
from moorline.ledger.blocks import Header
from moorline.ledger.engines.cometbft.canonical import NANOSECONDS
from moorline.ledger.engines.cometbft.evidence import DuplicateVote, LightClientAttack
from moorline.ledger.engines.cometbft.header import address_of, authority_validators, chain_id_of
from moorline.ledger.finding import Finding, Kind, SealedHeader
from moorline.ledger.light_client import LedgerTrust
from moorline.ledger.proof import SetChange
from moorline.ledger.re_execution import WrongExecution
from moorline.wire import schema
from moorline.wire.schema import Bytes32, Size

VERSION: Final = 1
MAX_BYTES: Final = re_execution.MAX_BYTES + (1 << 20)
CLOCK_OFF_S: Final = 6 * 3600
"""Honest votes of one round may come hours apart where the network was cut; half a day does not come of that."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Misconduct:
    """The message. `changes` as in evidence; `body` is what the kind says, encoded."""

    version: int
    kind: Kind
    ledger_id: Bytes32
    changes: tuple[SetChange, ...]
    body: Annotated[bytes, Size(at_most=re_execution.MAX_BYTES)]


@dataclass(frozen=True, slots=True, kw_only=True)
class InvalidBlock:
    """A sealed header, and where in the block under it the transaction stands."""

    sealed: SealedHeader
    transaction: Annotated[bytes, Size(at_most=128 * 1024)]
    index: int
    path: tuple[Bytes32, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class BackwardsBlock:
    """A sealed header, and the encoded header that it names as the one before."""

    sealed: SealedHeader
    previous: Annotated[bytes, Size(at_most=1024)]


def encode(kind: Kind, body: bytes, *, ledger_id: bytes, changes: tuple[SetChange, ...]) -> bytes:
    """Deterministic CBOR."""
    return schema.encode(Misconduct(version=VERSION, kind=kind, ledger_id=ledger_id, changes=changes, body=body))


def parse(data: bytes) -> Misconduct:
    """Raises only Malformed; establishes nothing."""
    found = schema.decode(Misconduct, data, max_bytes=MAX_BYTES)
    if found.version != VERSION:
        raise _malformed("its version is unknown")
    return found


def never_valid(transaction: bytes, *, ledger_id: bytes, height: int) -> bool:
    """Whether these bytes can stand in no block of this height, whatever the state is."""
    try:
        payload = transactions.parse(transaction).payload
    except Malformed:
        return True
    return payload.ledger_id != ledger_id or payload.valid_until < height


def verify(data: bytes, trust: LedgerTrust) -> Finding:
    """As evidence.verify, which calls it."""
    found = parse(data)
    if not same(found.ledger_id, trust.ledger_id):
        raise Refused(
            "ledger.other_ledger", "the evidence is of another ledger", expected=trust.ledger_id, got=found.ledger_id
        )
    kinds = {
        Kind.INVALID: _invalid,
        Kind.BACKWARDS: _backwards,
        Kind.EXECUTION: _execution,
        Kind.VOTES: _votes,
        Kind.ATTACK: _attack,
        Kind.CLOCK: _clock,
    }
    judge = kinds.get(found.kind)
    if judge is None:
        raise _malformed("its kind takes two things")
    finding = judge(found, trust)
    if not finding.offenders:
        raise Refused("ledger.evidence_names_nobody", "this shows no lie of an authority", got=finding.height)
    return finding


def late_or_early(found: CometAnchor, authorities: Mapping[str, bytes]) -> tuple[str, ...]:
    """Who of these authorities voted with a time that is far from the median of the commit's."""
    times = sorted(one.time_ns for one in found.signed.commit.precommits)
    median = times[len(times) // 2]
    names = {address_of(key): name for name, key in authorities.items()}
    off = (one.address for one in found.signed.commit.precommits if abs(one.time_ns - median) >= CLOCK_OFF_S * NANOSECONDS)
    return tuple(sorted(names[address] for address in off if address in names))


def _sealed(found: Misconduct, sealed: SealedHeader, trust: LedgerTrust) -> Header:
    """The header, once its seal holds."""
    header = schema.decode(Header, sealed.header)
    authorities, _ = light_client.set_in_force(found.changes, trust, before=header.height)
    seals.verify(sealed.seal, header, ledger_id=found.ledger_id, authorities=authorities)
    return header


def _invalid(found: Misconduct, trust: LedgerTrust) -> Finding:
    body = schema.decode(InvalidBlock, found.body, max_bytes=MAX_BYTES)
    header = _sealed(found, body.sealed, trust)
    merkle.verify_inclusion(
        merkle.leaf_hash(body.transaction), body.index, header.transactions_count, body.path, header.transactions_root
    )
    wrong = never_valid(body.transaction, ledger_id=found.ledger_id, height=header.height)
    return _one(Kind.INVALID, header.height, (body.sealed.seal.name,) if wrong else ())


def _backwards(found: Misconduct, trust: LedgerTrust) -> Finding:
    body = schema.decode(BackwardsBlock, found.body, max_bytes=MAX_BYTES)
    header = _sealed(found, body.sealed, trust)
    previous = schema.decode(Header, body.previous)
    if not same(blocks.digest(previous), header.previous):
        raise _malformed("the header before is not the one that the sealed header follows")
    wrong = header.time_ms <= previous.time_ms
    return _one(Kind.BACKWARDS, header.height, (body.sealed.seal.name,) if wrong else ())


def _execution(found: Misconduct, trust: LedgerTrust) -> Finding:
    body = schema.decode(WrongExecution, found.body, max_bytes=re_execution.MAX_BYTES)
    header = _sealed(found, body.sealed, trust)  # first: executing costs more than a signature
    fault = re_execution.judge(body, header, ledger_id=found.ledger_id)
    return _one(Kind.EXECUTION, header.height, () if fault is None else (body.sealed.seal.name,), fault=fault)


def _votes(found: Misconduct, trust: LedgerTrust) -> Finding:
    body = DuplicateVote.parse(found.body)
    address = body.verify(chain_id=chain_id_of(found.ledger_id))
    authorities, _ = light_client.set_in_force(found.changes, trust, before=body.height - 1)
    return _one(Kind.VOTES, body.height, _names((address,), authorities))


def _attack(found: Misconduct, trust: LedgerTrust) -> Finding:
    body = LightClientAttack.parse(found.body)
    height = body.one.header.height
    authorities, _ = light_client.set_in_force(found.changes, trust, before=height - 1)
    common = authority_validators(authorities)
    addresses = body.verify(common, chain_id=chain_id_of(found.ledger_id))
    forked = {body.one.header.validators_hash, body.other.header.validators_hash} == {common.hash()}
    return _one(Kind.ATTACK, height, _names(addresses, authorities), forked=forked)


def _clock(found: Misconduct, trust: LedgerTrust) -> Finding:
    body = anchor.parse(found.body)
    if not isinstance(body, CometAnchor) or not same(body.checkpoint.ledger_id, found.ledger_id):
        raise _malformed("a commit of this ledger is expected")
    height = body.signed.header.height
    authorities, quorum = light_client.set_in_force(found.changes, trust, before=height - 1)
    anchor.verify(body, authorities, quorum)
    return _one(Kind.CLOCK, height, late_or_early(body, authorities))


def _one(kind: Kind, height: int, offenders: tuple[str, ...], *, forked: bool = False, fault: str | None = None) -> Finding:
    return Finding(kind=kind, height=height, offenders=offenders, forked=forked, fault=fault)


def _names(addresses: tuple[bytes, ...], authorities: Mapping[str, bytes]) -> tuple[str, ...]:
    names = {address_of(key): name for name, key in authorities.items()}
    return tuple(sorted(names[address] for address in addresses if address in names))


def _malformed(why: str) -> Malformed:
    return Malformed("ledger.evidence_malformed", f"the evidence cannot be read: {why}")
