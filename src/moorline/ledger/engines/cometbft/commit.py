"""A commit: the precommits that made a block final (0.38: types/block.go, types/validation.go).

`signers` counts only signatures that hold, one a validator, for exactly this block; nothing else says that a block is final.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Final

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from moorline.errors import Malformed, NotAuthentic
from moorline.ledger.engines.cometbft import canonical
from moorline.ledger.engines.cometbft.header import Hash, Header, Validator, ValidatorSet
from moorline.wire.schema import Bytes64, Size

FOR_BLOCK: Final = 2
"""BLOCK_ID_FLAG_COMMIT. Votes for nil, and absent ones, say nothing for a block and are not carried."""
MAX_SIGNATURES: Final = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class Precommit:
    """One validator's signature for the block."""

    address: Annotated[bytes, Size(20)]
    time_ns: int
    signature: Bytes64


@dataclass(frozen=True, slots=True, kw_only=True)
class Commit:
    """Precommits of one round for one block, whose hash comes from its header."""

    round: int
    parts_total: int
    parts_hash: Hash
    precommits: tuple[Precommit, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class SignedHeader:
    """A header and what is said to be its commit; a value that establishes nothing."""

    header: Header
    commit: Commit

    def block(self) -> bytes:
        """The canonical id of the block its votes are for."""
        return canonical.block_id(self.header.hash(), self.commit.parts_total, self.commit.parts_hash)

    def sign_bytes(self, precommit: Precommit, block: bytes | None = None) -> bytes:
        """What this validator signed, if it did. `block` is `block()`, for who asks often."""
        return canonical.vote(
            canonical.PRECOMMIT,
            height=self.header.height,
            round_=self.commit.round,
            block=self.block() if block is None else block,
            time_ns=precommit.time_ns,
            chain_id=self.header.chain_id,
        )


def signers(signed: SignedHeader, validators: ValidatorSet, *, strangers_allowed: bool) -> tuple[Validator, ...]:
    """Those of `validators` whose signatures hold, all of them verified.

    With `strangers_allowed` signatures of others are passed over (a set that was trusted earlier); without, they are
    refused. Raises NotAuthentic("ledger.signature_invalid" | "ledger.signature_unknown"), and
    Malformed("comet.commit_malformed") for a commit that no set of this size makes.
    """
    if not 0 < len(signed.commit.precommits) <= MAX_SIGNATURES or len(signed.commit.parts_hash) != 32:
        raise Malformed("comet.commit_malformed", "a commit has one to so many precommits, and a part-set header")
    known, block = validators.by_address(), signed.block()
    found: dict[bytes, Validator] = {}
    for precommit in signed.commit.precommits:
        validator = known.get(precommit.address)
        if precommit.address in found:
            raise NotAuthentic("ledger.signature_unknown", "a validator's precommit is there twice", got=precommit.address)
        if validator is None:
            if strangers_allowed:
                continue
            raise NotAuthentic("ledger.signature_unknown", "a precommit is of no validator in force", got=precommit.address)
        _verify(validator.public_key, precommit.signature, signed.sign_bytes(precommit, block), precommit.address)
        found[precommit.address] = validator
    return tuple(found.values())


def require_power(signed: SignedHeader, validators: ValidatorSet) -> tuple[Validator, ...]:
    """The validators that made the block final: more than two thirds of the power of this very set.

    Raises as `signers`, and NotAuthentic("ledger.quorum_missing").
    """
    found = signers(signed, validators, strangers_allowed=False)
    power = sum(one.power for one in found)
    if power * 3 <= validators.power * 2:
        raise NotAuthentic(
            "ledger.quorum_missing",
            "too few validators signed this block",
            expected=f"> 2/3 of {validators.power}",
            got=power,
            remedy="ask another authority",
        )
    return found


def _verify(public_key: bytes, signature: bytes, message: bytes, address: bytes) -> None:
    try:
        Ed25519PublicKey.from_public_bytes(public_key).verify(signature, message)
    except (InvalidSignature, ValueError):
        raise NotAuthentic("ledger.signature_invalid", "a validator's signature does not hold", got=address) from None
