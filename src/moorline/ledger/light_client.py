"""The light client: believes the ledger only as far as a quorum of known authorities signed, and only recent words.

verify_bundle, in this order:
  1. the bundle is well-formed;
  2. its checkpoint is of the ledger this client was provisioned for;
  3. from the authority set provisioned, every change of the set is signed by a quorum of the set before it, and a set on
     the way was known to be in force no longer ago than the trusting period: who left before may have sold their keys;
  4. the checkpoint is cosigned by a quorum of the set in force;
  5. it is no older than `max_age_s`, and not from the future by more than `MAX_SKEW_S`;
  6. it is not behind the highest checkpoint this client has seen, nor another at the same height;
  7. the state proof leads to the checkpoint's state root, and shows exactly the keys and values that are listed.

Pure: the present and the highest checkpoint are arguments, and the caller persists `ProvenState.checkpoint` when it is
higher.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Final

from moorline.clock import Instant
from moorline.digest import same
from moorline.errors import Malformed, NotAuthentic, Refused, Unavailable
from moorline.ledger import anchor, proof, records
from moorline.ledger.checkpoint import Checkpoint, quorum_of
from moorline.ledger.partial_tree import PartialTree
from moorline.ledger.places import value_digest
from moorline.ledger.records import Der, RevocationsRecord
from moorline.ledger.revocation_list import RevocationList
from moorline.wire import schema
from moorline.wire.schema import Bytes32

MAX_SKEW_S: Final = 5
MAX_TRUST_BYTES: Final = 64 * 1024
TRUSTING_PERIOD_S: Final = 180 * 86_400
"""What a trust file is made with (ADR 0021)."""
REMIND_S: Final = 30 * 86_400
"""How long before a trust file ends its owner is reminded; a sixth of a shorter period than six times that."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LedgerTrust:
    """What a party is provisioned with and believes without proof; the trust file holds its encoding.

    `authorities`: name to raw Ed25519 checkpoint key. `roots`: consortium root certificates, DER. `simulated_allowed` is a
    fact of the genesis, which `ledger_id` covers. `max_age_s` is this party's own bound. `known_s`: when these authorities
    were known to be in force, seconds; after `trusting_period_s` more nothing follows from them, unless the party has seen
    the ledger since (`verify_bundle`, `highest`).
    """

    ledger_id: Bytes32
    authorities: dict[str, Bytes32]
    quorum: int
    roots: tuple[Der, ...]
    simulated_allowed: bool
    max_age_s: int
    known_s: int
    trusting_period_s: int

    @property
    def ends(self) -> Instant:
        """From when on nothing follows from it any more, for a party that has not seen the ledger since."""
        return Instant(self.known_s + self.trusting_period_s)

    def ending(self, now: Instant) -> bool:
        """Whether it has ended, or will so soon that it should be renewed."""
        return self.ends - now < min(REMIND_S, self.trusting_period_s // 6)

    def encode(self) -> bytes:
        """Deterministic CBOR."""
        return schema.encode(self)

    @classmethod
    def parse(cls, data: bytes) -> LedgerTrust:
        """Raises only Malformed; a quorum that f faulty authorities could defeat is malformed too."""
        trust = schema.decode(cls, data, max_bytes=MAX_TRUST_BYTES)
        if not trust.authorities or not quorum_of(len(trust.authorities)) <= trust.quorum <= len(trust.authorities):
            raise Malformed(
                "ledger.trust_malformed",
                "the quorum of the trust file does not fit its authorities",
                expected=quorum_of(len(trust.authorities)),
                got=trust.quorum,
            )
        if trust.known_s < 0 or trust.trusting_period_s < 1:
            raise Malformed("ledger.trust_malformed", "the trust file has no trusting period", got=trust.trusting_period_s)
        return trust


class ProvenState:
    """Part of a ledger's state at one checkpoint, proven. Only `verify_bundle` makes one, and what follows from one."""

    __slots__ = ("_records", "checkpoint")

    def __init__(self, checkpoint: Checkpoint, records: Mapping[str, bytes | None], *, _proven: object = None) -> None:
        if _proven is not _TOKEN:
            message = "a ProvenState comes from verify_bundle only"
            raise TypeError(message)
        self.checkpoint = checkpoint
        self._records = records

    @property
    def height(self) -> int:
        """Height of the block."""
        return self.checkpoint.height

    @property
    def time(self) -> Instant:
        """Block time."""
        return self.checkpoint.time

    def tells(self, key: str) -> bool:
        """Whether it says anything about this key."""
        return key in self._records

    def has(self, key: str) -> bool:
        """Whether the key is proven present; False if proven absent. Raises Refused("ledger.not_proven") if neither."""
        return self._proven(key) is not None

    def record(self, key: str) -> bytes:
        """The value under `key`; raises Refused("ledger.absent" if proven absent, "ledger.not_proven" if neither)."""
        value = self._proven(key)
        if value is None:
            raise Refused("ledger.absent", "the ledger has no such record", got=key)
        return value

    def absent(self, key: str) -> None:
        """Raises Refused("ledger.present") if there is a record, Refused("ledger.not_proven") if the bundle does not say."""
        if self._proven(key) is not None:
            raise Refused("ledger.present", "the ledger has a record where none should be", got=key)

    def _proven(self, key: str) -> bytes | None:
        if key not in self._records:
            raise Refused(
                "ledger.not_proven", "the bundle says nothing about this key", got=key, remedy="ask for a bundle with it"
            )
        return self._records[key]


_TOKEN: Final = object()


def together(states: Iterable[ProvenState]) -> ProvenState:
    """What several bundles prove, as one; of a key proven twice, the later proof. Its checkpoint is the oldest of theirs.

    Each part was proven at its own checkpoint: what is said about two keys need not have been true at one moment. Whoever
    judges age judges the oldest.
    """
    in_order = sorted(states, key=lambda state: state.checkpoint.height)
    records: dict[str, bytes | None] = {}
    for state in in_order:
        records.update(state._records)  # noqa: SLF001 - of its own kind
    return ProvenState(in_order[0].checkpoint, records, _proven=_TOKEN)


def unlisted(state: ProvenState, listed: RevocationList, keys: Iterable[str]) -> ProvenState:
    """The same, with the absence of revocations (`keys`, of the list's registrant) that its count and the list show.

    `state` is as one bundle proved it: whether a count is older than another shows in its height. Raises
    Refused("ledger.absent" | "ledger.not_proven") without a count, NotAuthentic("ledger.revocations_differ"), and
    Refused("ledger.not_proven") where the list does not reach so far, or has the key: then its own record says.
    """
    count = records.parse(RevocationsRecord, state.record(records.revocations_index_key(listed.registrant)))
    shown = dict.fromkeys(keys)
    mine = [key.startswith("revocation/") and key.split("/")[2] == listed.registrant for key in shown]
    if not listed.covers(count, height=state.height) or not all(mine) or any(key in listed for key in shown):
        raise Refused(
            "ledger.not_proven", "the list of revocations does not show that these are absent", got=listed.registrant
        )
    return ProvenState(state.checkpoint, {**state._records, **shown}, _proven=_TOKEN)  # noqa: SLF001 - of its own kind


def verify_bundle(bundle: bytes, trust: LedgerTrust, *, now: Instant, highest: Checkpoint | None = None) -> ProvenState:
    """The proven part of the state. Numbers are those of the module's docstring.

    Raises Malformed;
    NotAuthentic("ledger.quorum_missing" | "ledger.signature_invalid" | "ledger.signature_unknown" | "ledger.proof_invalid"
    | "ledger.fork");
    Refused("ledger.other_ledger" | "ledger.trust_expired" | "ledger.proof_stale" | "ledger.proof_from_future" |
    "ledger.rollback").
    """
    parsed = proof.parse_bundle(bundle)  # 1
    head = anchor.parse(parsed.note)
    if not same(head.checkpoint.ledger_id, trust.ledger_id):  # 2
        raise Refused(
            "ledger.other_ledger",
            "the proof is of another ledger",
            expected=trust.ledger_id,
            got=head.checkpoint.ledger_id,
        )
    authorities, quorum = set_in_force(parsed.changes, trust, before=head.checkpoint.height)  # 3
    require_known(parsed.changes, trust, now=now, highest=highest)
    checkpoint = anchor.verify(head, authorities, quorum)  # 4
    judge_age(checkpoint, now=now, max_age_s=trust.max_age_s)  # 5
    judge_progress(checkpoint, highest)  # 6
    return ProvenState(checkpoint, _proven_records(parsed, checkpoint), _proven=_TOKEN)  # 7


def judge_age(checkpoint: Checkpoint, *, now: Instant, max_age_s: int) -> None:
    """Raises Refused("ledger.proof_stale" | "ledger.proof_from_future")."""
    age = now - checkpoint.time
    if age > max_age_s:
        raise Refused(
            "ledger.proof_stale",
            "the proof is too old",
            expected=f"<= {max_age_s} s",
            got=f"{age} s",
            remedy="fetch a newer proof; if there is none the ledger has stopped",
        )
    if age < -MAX_SKEW_S:
        raise Refused(
            "ledger.proof_from_future", "the proof is from the future", expected=f">= -{MAX_SKEW_S} s", got=f"{age} s"
        )


def judge_progress(checkpoint: Checkpoint, highest: Checkpoint | None) -> None:
    """Raises Refused("ledger.rollback") behind `highest`, NotAuthentic("ledger.fork") for another at its height."""
    if highest is None:
        return
    if checkpoint.height < highest.height:
        raise Refused(
            "ledger.rollback", "the proof is older than what was seen before", expected=highest.height, got=checkpoint.height
        )
    if checkpoint.height == highest.height and checkpoint != highest:
        raise NotAuthentic(
            "ledger.fork",
            "authorities signed two states at one height",
            expected=highest.state_root,
            got=checkpoint.state_root,
            remedy="keep both proofs: together they show which authorities lied",
        )


def require_known(
    changes: tuple[proof.SetChange, ...], trust: LedgerTrust, *, now: Instant, highest: Checkpoint | None
) -> None:
    """Raises Refused("ledger.trust_expired") if no set that `changes` lead from was known within the trusting period.

    `changes` were verified (`set_in_force`). A party that has seen `highest` knows which set was in force after it: if the
    changes come to that set, it was known then.
    """
    known = trust.known_s
    if highest is not None:
        verified = _following(changes, trust)
        until = [one for one in verified if anchor.parse(one.note).checkpoint.height <= highest.height]
        seen = until[-1].authorities if until else trust.authorities
        if highest.authorities in anchor.set_digests(seen):
            known = max(known, highest.time)
    if now - known > trust.trusting_period_s:
        raise Refused(
            "ledger.trust_expired",
            "these authorities were last known to be in force too long ago",
            expected=f"<= {trust.trusting_period_s} s",
            got=f"{now - known} s",
            remedy="get a new trust file from somebody you trust; before the period ends: moor ledger trust --renew",
        )


def renewed(bundle: bytes, trust: LedgerTrust, *, now: Instant) -> LedgerTrust:
    """The same trust in the authorities that a verified head says are in force after it.

    Raises as verify_bundle, and Unavailable("ledger.set_changing") for a head that changed the set itself.
    """
    checkpoint = verify_bundle(bundle, trust, now=now).checkpoint
    authorities, _ = set_in_force(proof.parse_bundle(bundle).changes, trust, before=checkpoint.height)
    if checkpoint.authorities not in anchor.set_digests(authorities):
        raise Unavailable(
            "ledger.set_changing", "the authorities have just changed", remedy="ask again in a moment", retry_after_s=2
        )
    return replace(
        trust,
        authorities=dict(authorities),
        quorum=trust.quorum if dict(authorities) == trust.authorities else quorum_of(len(authorities)),
        known_s=checkpoint.time,
    )


def set_in_force(
    changes: tuple[proof.SetChange, ...], trust: LedgerTrust, *, before: int
) -> tuple[Mapping[str, bytes], int]:
    """The authorities that sign a head at height `before`, and how many must, by `changes` from the set the trust knows.

    Raises NotAuthentic("ledger.proof_invalid", and as `anchor.verify`).
    """
    authorities: Mapping[str, bytes] = trust.authorities
    quorum = trust.quorum
    height = -1
    for change in _following(changes, trust):
        changing = anchor.parse(change.note)
        checkpoint = anchor.verify(changing, authorities, quorum)
        if not same(checkpoint.ledger_id, trust.ledger_id) or not height < checkpoint.height < before:
            raise NotAuthentic("ledger.proof_invalid", "a change of the authority set is out of place")
        if not same(checkpoint.authorities, anchor.set_digest(changing, change.authorities)):
            raise NotAuthentic("ledger.proof_invalid", "a change of the authority set is not the one that was signed")
        authorities, quorum, height = change.authorities, quorum_of(len(change.authorities)), checkpoint.height
    return authorities, quorum


def _following(changes: tuple[proof.SetChange, ...], trust: LedgerTrust) -> tuple[proof.SetChange, ...]:
    """Those after the last one that led to the set the trust knows: a client provisioned late needs none before."""
    known = [index for index, change in enumerate(changes) if dict(change.authorities) == trust.authorities]
    return changes[known[-1] + 1 if known else 0 :]


def _proven_records(bundle: proof.Bundle, checkpoint: Checkpoint) -> dict[str, bytes | None]:
    tree = PartialTree.parse(bundle.tree)
    tree.exactly_for(entry.key for entry in bundle.records)
    if not same(tree.root, checkpoint.state_root):
        raise NotAuthentic(
            "ledger.proof_invalid", "the state proof leads to another root", expected=checkpoint.state_root, got=tree.root
        )
    for entry in bundle.records:
        proven = tree.lookup(entry.key)
        claimed = None if entry.value is None else value_digest(entry.value)
        if proven != claimed:
            raise NotAuthentic("ledger.proof_invalid", "the bundle lists another value than it proves", got=entry.key)
    return {entry.key: entry.value for entry in bundle.records}
