"""Evidence that an authority lied: one file, verifiable by anybody with the trust file (docs/spec/ledger-evidence.md). Pure.

    heads       two checkpoints of one ledger at one height that differ, each with signatures: offenders are all who signed
                both, as cosigner or as maker of the block;
    proposals   two sealed headers of one ledger, term, height and attempt that differ: the offender is who sealed both.

No honest authority makes either (it records what it signs before it signs, one block a height; ledger.seals). What one
thing alone shows, of either engine, is in ledger.misconduct; `verify` takes all of it. Signatures are the authorities' and
cover ledger and height, so evidence cannot be made up by others, and needs no witness.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Annotated, Final

from moorline.digest import same
from moorline.errors import Malformed, Refused
from moorline.ledger import checkpoint, light_client, misconduct, seals
from moorline.ledger.blocks import Header
from moorline.ledger.finding import Finding, Kind, SealedHeader
from moorline.ledger.light_client import LedgerTrust
from moorline.ledger.proof import SetChange
from moorline.ledger.seals import Seal
from moorline.wire import cbor, schema
from moorline.wire.schema import Bytes32, Size

VERSION: Final = 1
MAX_EVIDENCE_BYTES: Final = misconduct.MAX_BYTES
TWICE: Final = frozenset({Kind.HEADS, Kind.PROPOSALS})


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """The message. `changes` lead from the authorities a reader knows to those in force, as in a proof bundle.

    `notes` are two for `heads` and none else, `proposals` two for `proposals` and none else.
    """

    version: int
    kind: Kind
    ledger_id: Bytes32
    changes: tuple[SetChange, ...]
    notes: tuple[Annotated[bytes, Size(at_most=16 * 1024)], ...]
    proposals: tuple[SealedHeader, ...]


def of_heads(ledger_id: bytes, first: bytes, second: bytes, changes: tuple[SetChange, ...]) -> bytes:
    """Evidence of two notes at one height; the order they come in does not matter."""
    return schema.encode(
        Evidence(
            version=VERSION,
            kind=Kind.HEADS,
            ledger_id=ledger_id,
            changes=changes,
            notes=tuple(sorted((first, second))),
            proposals=(),
        )
    )


def of_proposals(
    ledger_id: bytes, first: tuple[Header, Seal], second: tuple[Header, Seal], changes: tuple[SetChange, ...]
) -> bytes:
    """Evidence of two sealed headers; the order they come in does not matter."""
    both = sorted((schema.encode(header), seal) for header, seal in (first, second)) if first[0] != second[0] else []
    return schema.encode(
        Evidence(
            version=VERSION,
            kind=Kind.PROPOSALS,
            ledger_id=ledger_id,
            changes=changes,
            notes=(),
            proposals=tuple(SealedHeader(header=header, seal=seal) for header, seal in both),
        )
    )


def identify(data: bytes) -> str:
    """The id of evidence: SHA-256 in hex."""
    return hashlib.sha256(data).hexdigest()


def kind_of(data: bytes) -> Kind:
    """What kind of evidence this says it is. Raises only Malformed."""
    said = cbor.decode(data, max_bytes=MAX_EVIDENCE_BYTES)
    kind = said.get("kind") if isinstance(said, dict) else None
    if kind not in set(Kind):
        raise _malformed("it names no kind of evidence")
    return Kind(kind)


def verify(data: bytes, trust: LedgerTrust) -> Finding:
    """What the evidence shows under this trust, offline.

    Raises Malformed("ledger.evidence_malformed", `ledger.*`, `message.*`, `cbor.*`); Refused("ledger.other_ledger" |
    "ledger.evidence_names_nobody"); NotAuthentic (`ledger.*`) for signatures that do not hold.
    """
    if kind_of(data) not in TWICE:
        return misconduct.verify(data, trust)
    found = schema.decode(Evidence, data, max_bytes=MAX_EVIDENCE_BYTES)
    if found.version != VERSION:
        raise _malformed("its version is unknown")
    if not same(found.ledger_id, trust.ledger_id):
        raise Refused(
            "ledger.other_ledger", "the evidence is of another ledger", expected=trust.ledger_id, got=found.ledger_id
        )
    heads = found.kind is Kind.HEADS
    if (len(found.notes), len(found.proposals)) != ((2, 0) if heads else (0, 2)):
        raise _malformed("two things of its kind are expected")
    finding = _heads(found, trust) if heads else _proposals(found, trust)
    if not finding.offenders:
        raise Refused("ledger.evidence_names_nobody", "nobody signed both: this shows no lie", got=finding.height)
    return finding


def _heads(found: Evidence, trust: LedgerTrust) -> Finding:
    notes = [checkpoint.parse_note(data) for data in found.notes]
    first, second = (note.checkpoint for note in notes)
    if first.height != second.height or first == second or list(found.notes) != sorted(found.notes):
        raise _malformed("two different checkpoints of one height are expected, in order")
    for one in (first, second):
        if not same(one.ledger_id, trust.ledger_id):
            raise Refused("ledger.other_ledger", "a checkpoint in the evidence is of another ledger", got=one.ledger_id)
    authorities, quorum = light_client.set_in_force(found.changes, trust, before=first.height)
    cosigned = [set(checkpoint.signers(note, authorities)) for note in notes]
    made = [checkpoint.makers(note, authorities) for note in notes]
    return Finding(
        kind=Kind.HEADS,
        height=first.height,
        offenders=tuple(sorted((cosigned[0] & cosigned[1]) | (made[0] & made[1]))),
        forked=all(len(names) >= quorum for names in cosigned),
    )


def _proposals(found: Evidence, trust: LedgerTrust) -> Finding:
    first, second = found.proposals
    headers = [schema.decode(Header, one.header) for one in (first, second)]
    about = [
        (one.seal.term, one.seal.attempt, one.seal.name, header.height)
        for one, header in zip((first, second), headers, strict=True)
    ]
    if about[0] != about[1] or not first.header < second.header:
        raise _malformed("two different headers of one attempt are expected, in order")
    height = headers[0].height
    authorities, _ = light_client.set_in_force(found.changes, trust, before=height)
    for one, header in zip((first, second), headers, strict=True):
        seals.verify(one.seal, header, ledger_id=found.ledger_id, authorities=authorities)
    return Finding(kind=Kind.PROPOSALS, height=height, offenders=(first.seal.name,), forked=False)


def _malformed(why: str) -> Malformed:
    return Malformed("ledger.evidence_malformed", f"the evidence cannot be read: {why}")
