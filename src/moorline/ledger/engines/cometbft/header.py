"""CometBFT's block header and validator set, and their hashes (0.38: types/block.go, types/validator_set.go).

Values: whether a quorum stands behind a header is for `commit` and `verifier` to say. All hashes are RFC 6962 trees.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Final

from moorline.audit import merkle
from moorline.errors import Malformed
from moorline.ledger.engines.cometbft import canonical
from moorline.wire.schema import Bytes32, Size

ADDRESS_BYTES: Final = 20
CHAIN_PREFIX: Final = "moor-"
AUTHORITY_POWER: Final = 2
"""Every authority has the same, so that two thirds of the power are two thirds of the authorities.

Two and not one: CometBFT halves the power of all votes in whole numbers to find block time (0.38: types/time/time.go,
WeightedMedian). With one each, three votes of four give the earliest, and one validator whose clock is late stops the chain.
"""

Hash = Annotated[bytes, Size(at_most=32)]
Address = Annotated[bytes, Size(20)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """The fields of tendermint.types.Header that its hash covers. Hashes are empty where CometBFT leaves them so."""

    version_block: int
    version_app: int
    chain_id: Annotated[str, Size(at_most=50)]
    height: int
    time_ns: int
    last_block_hash: Hash
    last_parts_total: int
    last_parts_hash: Hash
    last_commit_hash: Hash
    data_hash: Hash
    validators_hash: Bytes32
    next_validators_hash: Bytes32
    consensus_hash: Hash
    app_hash: Hash
    last_results_hash: Hash
    evidence_hash: Hash
    proposer_address: Address

    def hash(self) -> bytes:
        """The block's hash; 32 bytes."""
        fields = (
            canonical.number(1, self.version_block) + canonical.number(2, self.version_app),
            canonical.blob(1, self.chain_id.encode()),
            canonical.number(1, self.height),
            canonical.timestamp(self.time_ns),
            canonical.block_id(self.last_block_hash, self.last_parts_total, self.last_parts_hash),
            canonical.blob(1, self.last_commit_hash),
            canonical.blob(1, self.data_hash),
            canonical.blob(1, self.validators_hash),
            canonical.blob(1, self.next_validators_hash),
            canonical.blob(1, self.consensus_hash),
            canonical.blob(1, self.app_hash),
            canonical.blob(1, self.last_results_hash),
            canonical.blob(1, self.evidence_hash),
            canonical.blob(1, self.proposer_address),
        )
        return merkle.root([merkle.leaf_hash(field) for field in fields])


@dataclass(frozen=True, slots=True, kw_only=True)
class Validator:
    """An Ed25519 key with a voting power."""

    public_key: Bytes32
    power: int

    @property
    def address(self) -> bytes:
        """20 bytes."""
        return address_of(self.public_key)


@dataclass(frozen=True, slots=True)
class ValidatorSet:
    """Validators in CometBFT's order: power down, address up. Make it with `of`."""

    validators: tuple[Validator, ...]

    @classmethod
    def of(cls, validators: Iterable[Validator]) -> ValidatorSet:
        """The set of these.

        Raises Malformed("comet.validators_malformed") if a key is there twice or a power not positive.
        """
        ordered = tuple(sorted(validators, key=lambda one: (-one.power, one.address)))
        if not ordered or len({one.public_key for one in ordered}) != len(ordered) or ordered[-1].power < 1:
            raise Malformed(
                "comet.validators_malformed", "a validator set has distinct keys with positive power, one at least"
            )
        return cls(ordered)

    def hash(self) -> bytes:
        """What `validators_hash` of a header holds; 32 bytes."""
        leaves = (
            canonical.embedded(1, canonical.blob(1, one.public_key)) + canonical.number(2, one.power)
            for one in self.validators
        )
        return merkle.root([merkle.leaf_hash(leaf) for leaf in leaves])

    @property
    def power(self) -> int:
        """Of all together."""
        return sum(one.power for one in self.validators)

    def by_address(self) -> dict[bytes, Validator]:
        """Address to validator."""
        return {one.address: one for one in self.validators}


def address_of(public_key: bytes) -> bytes:
    """A validator's address: the first 20 bytes of SHA-256 of its key."""
    return hashlib.sha256(public_key).digest()[:ADDRESS_BYTES]


def authority_validators(authorities: Mapping[str, bytes]) -> ValidatorSet:
    """The validators that these authorities (name to raw Ed25519 key) are, one vote each."""
    return ValidatorSet.of(Validator(public_key=key, power=AUTHORITY_POWER) for key in authorities.values())


def chain_id_of(ledger_id: bytes) -> str:
    """The chain id of a ledger: every vote is for one ledger, and covers its genesis."""
    return CHAIN_PREFIX + base64.urlsafe_b64encode(ledger_id).decode("ascii").rstrip("=")


def ledger_id_of(chain_id: str) -> bytes:
    """The ledger a chain id stands for; raises Malformed("comet.chain_id_malformed")."""
    try:
        ledger_id = base64.b64decode(chain_id.removeprefix(CHAIN_PREFIX) + "=", altchars=b"-_", validate=True)
    except ValueError:
        ledger_id = b""
    if len(ledger_id) != 32 or chain_id_of(ledger_id) != chain_id:
        raise Malformed("comet.chain_id_malformed", "the chain id is of no ledger", got=chain_id[:50])
    return ledger_id


def transactions_root(transactions: Iterable[bytes]) -> bytes:
    """What `data_hash` of a header holds: over the SHA-256 of each transaction, in order."""
    return merkle.root([transaction_leaf(one) for one in transactions])


def transaction_leaf(transaction: bytes) -> bytes:
    """The leaf of a transaction below `data_hash`."""
    return merkle.leaf_hash(hashlib.sha256(transaction).digest())
