"""Revoking, for whoever may: one record a thing for good, numbered under its registrant. Pure.

The n-th thing that a registrant revoked stands at `records.numbered_revocation_index_key(registrant, n)`; how many there
are, and a digest over their keys in order, at `records.revocations_index_key(registrant)`. So who has seen the first n knows
from one record whether there is anything else, and whether what it kept is what the ledger has. Without a count (a ledger of
genesis version 1) nothing is numbered, and each key is asked about by itself.
"""

from __future__ import annotations

from moorline.errors import Conflict
from moorline.ledger import records
from moorline.ledger.draft import Draft
from moorline.ledger.records import CONSORTIUM, IndexRecord, RevocationKind, RevocationRecord, RevocationsRecord
from moorline.ledger.revocation_list import NONE, digest_after


def begin(draft: Draft, provider: str) -> None:
    """Number what a new provider is going to revoke, if this ledger numbers."""
    if draft.get(records.revocations_index_key(CONSORTIUM)) is not None:
        draft.write(records.revocations_index_key(provider), NONE)


def revoke(draft: Draft, kind: RevocationKind, registrant: str, revoked_id: str) -> None:
    """Write it and number it. Raises Conflict("ledger.already_revoked"), Malformed("ledger.name_malformed")."""
    key = records.revocation_key(kind, registrant, records.parse_id(revoked_id, "revoked id"))
    if draft.get(key) is not None:
        raise Conflict("ledger.already_revoked", "it is revoked already", got=key)
    draft.write(key, RevocationRecord(kind=kind, registrant=registrant, id=revoked_id, time_ms=draft.block.time_ms))
    _number(draft, registrant, key)
    draft.tell("revoked", key)


def _number(draft: Draft, registrant: str, key: str) -> None:
    index_key = records.revocations_index_key(registrant)
    before = draft.read(RevocationsRecord, index_key)
    if before is None:
        return
    after = RevocationsRecord(count=before.count + 1, digest=digest_after(before.digest, (key,)))
    draft.write(records.numbered_revocation_index_key(registrant, after.count), IndexRecord(holders=(key,)))
    draft.write(index_key, after)
