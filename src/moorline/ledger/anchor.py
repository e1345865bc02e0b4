"""An anchored head: what proofs start from, in the form of whichever engine the ledger runs (docs/spec/ledger-anchor.md).

Both forms say the same, `Checkpoint`: of this ledger, at this height and time, the state has this root, and these
authorities are in force afterwards. They differ in how a quorum signed it:

  *note*       the embedded engine: a checkpoint as a C2SP signed note with cosignatures (ledger.checkpoint);
  *cometbft*   a block header with its commit. The state after block h stands in the header of block h+1, and that
               header's time counts; the `root` of its checkpoint is that header's hash, which leads back to every block
               before.

A client need not know which engine a ledger runs: it verifies the form that it is given, against the same authorities.
Neither form can be taken for the other: what is signed starts differently.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from moorline.errors import Malformed, NotAuthentic
from moorline.ledger import checkpoint
from moorline.ledger.checkpoint import Checkpoint, Note
from moorline.ledger.engines.cometbft import commit, header
from moorline.ledger.engines.cometbft.canonical import NANOSECONDS
from moorline.ledger.engines.cometbft.commit import SignedHeader
from moorline.wire import schema

COMETBFT: Final = "cometbft"
MAX_ANCHOR_BYTES: Final = 16 * 1024
_NS_PER_MS: Final = NANOSECONDS // 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class CometAnchor:
    """The form of the CometBFT engine. `form` is COMETBFT."""

    form: str
    signed: SignedHeader

    @property
    def checkpoint(self) -> Checkpoint:
        """What it says, if a quorum signed it."""
        found = self.signed.header
        return Checkpoint(
            ledger_id=header.ledger_id_of(found.chain_id),
            size=found.height,
            root=found.hash(),
            height=found.height - 1,
            time_ms=found.time_ns // _NS_PER_MS,
            state_root=found.app_hash,
            authorities=found.next_validators_hash,
        )

    def encode(self) -> bytes:
        """Deterministic CBOR."""
        return schema.encode(self)


Anchor = Note | CometAnchor


def parse(data: bytes) -> Anchor:
    """An anchored head of either form; raises only Malformed. Its `checkpoint` is a claim until `verify`."""
    if data.startswith(checkpoint.ORIGIN.encode()):
        return checkpoint.parse_note(data)
    found = schema.decode(CometAnchor, data, max_bytes=MAX_ANCHOR_BYTES)
    head = found.signed.header
    if found.form != COMETBFT or head.height < 1 or len(head.app_hash) != 32:
        raise Malformed("ledger.anchor_malformed", "the anchored head makes no sense", expected=COMETBFT, got=found.form)
    header.ledger_id_of(head.chain_id)
    return found


def verify(anchor: Anchor, authorities: Mapping[str, bytes], quorum: int) -> Checkpoint:
    """The checkpoint, now known to be signed by `quorum` distinct `authorities` (name to raw Ed25519 key).

    It does not establish that it is recent or the latest. Raises NotAuthentic("ledger.quorum_missing" |
    "ledger.signature_invalid" | "ledger.signature_unknown").
    """
    if isinstance(anchor, Note):
        return checkpoint.verify_note(anchor, authorities, quorum)
    validators = header.authority_validators(authorities)
    if anchor.signed.header.validators_hash != validators.hash():
        raise NotAuthentic(
            "ledger.signature_unknown",
            "the header names other validators than the authorities known",
            expected=validators.hash(),
            got=anchor.signed.header.validators_hash,
            remedy="fetch the proof again; if the authorities changed, fetch the changes too",
        )
    found = commit.require_power(anchor.signed, validators)
    if quorum < 1 or len(found) < quorum:
        raise NotAuthentic(
            "ledger.quorum_missing",
            "too few authorities signed this header",
            expected=f"{quorum} of {len(authorities)}",
            got=len(found),
            remedy="ask another authority",
        )
    return anchor.checkpoint


def set_digest(anchor: Anchor, authorities: Mapping[str, bytes]) -> bytes:
    """What the `authorities` of this anchor's checkpoint holds for a set, by the rule of its form."""
    if isinstance(anchor, Note):
        return checkpoint.authority_set_digest(authorities)
    return header.authority_validators(authorities).hash()


def set_digests(authorities: Mapping[str, bytes]) -> tuple[bytes, bytes]:
    """What a checkpoint of either form holds for a set; neither form's can be another set's of the other form."""
    return checkpoint.authority_set_digest(authorities), header.authority_validators(authorities).hash()
