"""Evidence that validators broke the rules, which anybody who knows the validators can verify.

*Duplicate vote*: one validator, one height, round and kind of vote, two blocks, two signatures. It names its one offender.

*Light client attack*: two headers of one height that both have a commit. Who is named follows CometBFT (0.38:
types/evidence.go, GetByzantineValidators): if the headers differ in what validators compute from the chain, whoever of the
common validators signed the wrong one (lunatic: `offenders_against`); else, in one round, whoever signed both
(equivocation); in different rounds nobody can be named from the headers alone (amnesia).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Final

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from moorline.errors import Malformed, NotAuthentic
from moorline.ledger.engines.cometbft import canonical, commit
from moorline.ledger.engines.cometbft.commit import SignedHeader
from moorline.ledger.engines.cometbft.header import Hash, Validator, ValidatorSet, address_of
from moorline.ledger.engines.cometbft.verifier import LightBlock
from moorline.wire import schema
from moorline.wire.schema import Bytes32, Bytes64, Size

MAX_EVIDENCE_BYTES: Final = 128 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class SignedVote:
    """A vote's block (hash empty for nil), time and signature."""

    block_hash: Hash
    parts_total: int
    parts_hash: Hash
    time_ns: int
    signature: Bytes64

    def block(self) -> bytes:
        """The canonical block id; empty for nil."""
        if not self.block_hash:
            return b""
        return canonical.block_id(self.block_hash, self.parts_total, self.parts_hash)


@dataclass(frozen=True, slots=True, kw_only=True)
class DuplicateVote:
    """Two votes of the validator with `public_key`."""

    chain_id: Annotated[str, Size(at_most=50)]
    public_key: Bytes32
    kind: int
    height: int
    round: int
    one: SignedVote
    other: SignedVote

    def encode(self) -> bytes:
        """Deterministic CBOR."""
        return schema.encode(self)

    @classmethod
    def parse(cls, data: bytes) -> DuplicateVote:
        """Raises only Malformed; establishes nothing."""
        return schema.decode(cls, data, max_bytes=MAX_EVIDENCE_BYTES)

    def verify(self, *, chain_id: str) -> bytes:
        """The address of the offender. Whether it is a validator is for whoever knows the set to say.

        Raises Malformed("comet.evidence_malformed") if these are not two votes that exclude each other,
        NotAuthentic("comet.other_chain" | "ledger.signature_invalid").
        """
        if self.chain_id != chain_id:
            raise NotAuthentic("comet.other_chain", "the evidence is of another chain", expected=chain_id, got=self.chain_id)
        if self.kind not in (canonical.PREVOTE, canonical.PRECOMMIT) or self.one.block() == self.other.block():
            raise Malformed("comet.evidence_malformed", "evidence is two votes of one kind for different blocks")
        for one in (self.one, self.other):
            message = canonical.vote(
                self.kind,
                height=self.height,
                round_=self.round,
                block=one.block(),
                time_ns=one.time_ns,
                chain_id=self.chain_id,
            )
            try:
                Ed25519PublicKey.from_public_bytes(self.public_key).verify(one.signature, message)
            except (InvalidSignature, ValueError):
                raise NotAuthentic("ledger.signature_invalid", "a vote's signature does not hold") from None
        return address_of(self.public_key)


@dataclass(frozen=True, slots=True, kw_only=True)
class LightClientAttack:
    """Two commits at one height.

    `validators` signed `one`, `others` signed `other`, `common` were in force where they part.
    """

    common: tuple[Validator, ...]
    validators: tuple[Validator, ...]
    others: tuple[Validator, ...]
    one: SignedHeader
    other: SignedHeader

    @classmethod
    def of(cls, common: LightBlock, one: LightBlock, other: LightBlock) -> LightClientAttack:
        """From three light blocks that were verified."""
        return cls(
            common=common.validators.validators,
            validators=one.validators.validators,
            others=other.validators.validators,
            one=one.signed,
            other=other.signed,
        )

    def encode(self) -> bytes:
        """Deterministic CBOR."""
        return schema.encode(self)

    @classmethod
    def parse(cls, data: bytes) -> LightClientAttack:
        """Raises only Malformed; establishes nothing."""
        return schema.decode(cls, data, max_bytes=MAX_EVIDENCE_BYTES)

    def verify(self, common: ValidatorSet, *, chain_id: str) -> tuple[bytes, ...]:
        """The addresses of those who can be named, in order; none for amnesia. `common` is a set the reader trusts.

        Raises Malformed("comet.evidence_malformed") if the headers do not exclude each other, NotAuthentic
        ("comet.other_chain" | "comet.validators_mismatch", or as commit.require_power).
        """
        if {self.one.header.chain_id, self.other.header.chain_id} != {chain_id}:
            raise NotAuthentic("comet.other_chain", "the evidence is of another chain", expected=chain_id)
        if self.one.header.height != self.other.header.height or self.one.header.hash() == self.other.header.hash():
            raise Malformed("comet.evidence_malformed", "evidence is two headers of one height")
        if ValidatorSet.of(self.common) != common:
            raise NotAuthentic(
                "comet.validators_mismatch", "the evidence parts from another validator set than the one trusted"
            )
        signed_one = self._committed(self.one, self.validators)
        signed_other = self._committed(self.other, self.others)
        return tuple(sorted(self._offenders(common, signed_one, signed_other)))

    def _offenders(self, common: ValidatorSet, one: set[bytes], other: set[bytes]) -> set[bytes]:
        members = set(common.by_address())
        if self._lunatic():
            # Which of the two is the wrong one shows to whoever has the chain; from the pair alone, only those who signed
            # both are certain to have signed it.
            return one & other & members
        return one & other if self.one.commit.round == self.other.commit.round else set()

    def _lunatic(self) -> bool:
        one, other = self.one.header, self.other.header
        return (
            one.validators_hash != other.validators_hash
            or one.next_validators_hash != other.next_validators_hash
            or one.consensus_hash != other.consensus_hash
            or one.app_hash != other.app_hash
            or one.last_results_hash != other.last_results_hash
        )

    @staticmethod
    def _committed(signed: SignedHeader, validators: tuple[Validator, ...]) -> set[bytes]:
        found = ValidatorSet.of(validators)
        if found.hash() != signed.header.validators_hash:
            raise NotAuthentic("comet.validators_mismatch", "the validators are not the ones the header names")
        return {one.address for one in commit.require_power(signed, found)}


def offenders_against(attack: LightClientAttack, true_header_hash: bytes, common: ValidatorSet) -> tuple[bytes, ...]:
    """Who of `common` signed the header that is not the chain's, for a reader who knows which one is: all lunatics.

    Raises Malformed("comet.evidence_malformed") if neither header is the true one.
    """
    if attack.one.header.hash() == true_header_hash:
        wrong = attack.other
    elif attack.other.header.hash() == true_header_hash:
        wrong = attack.one
    else:
        raise Malformed("comet.evidence_malformed", "neither header of the evidence is the chain's")
    return tuple(sorted(one.address for one in commit.signers(wrong, common, strangers_allowed=True)))
