"""One step of the light client, whether this header is what a trusted one leads to (0.38: light/verifier.go).

verify, in this order:
  1. the trusted header is within the trusting period: beyond it those who signed then may have left and have nothing to
     lose;
  2. the new header is of the same chain, higher, later, and not from the future by more than `MAX_DRIFT_S`;
  3. its validators are the set that came with it;
  4. adjacent: that set is the one the trusted header announced; or skipping: validators with more than a third of the
     trusted power, one honest one among them, signed it;
  5. validators with more than two thirds of its own power signed it.

Pure. What it does not establish: that it is the only header at its height (light.compare), nor that it is the latest.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from moorline.errors import NotAuthentic, Refused
from moorline.ledger.engines.cometbft import commit
from moorline.ledger.engines.cometbft.canonical import NANOSECONDS
from moorline.ledger.engines.cometbft.commit import SignedHeader
from moorline.ledger.engines.cometbft.header import Validator, ValidatorSet

MAX_DRIFT_S: Final = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class LightBlock:
    """A signed header, the validators of its height and those of the next."""

    signed: SignedHeader
    validators: ValidatorSet
    next_validators: ValidatorSet

    @property
    def height(self) -> int:
        """Of the header."""
        return self.signed.header.height


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """`trusting_period_s` from a trusted header's time; the present in nanoseconds."""

    trusting_period_s: int
    now_ns: int


def verify(trusted: LightBlock, new: LightBlock, rules: Rules) -> None:
    """Returns if `new` may be trusted. Numbers are those of the module's docstring.

    Raises Refused("comet.trust_expired" | "comet.not_later" | "comet.from_future"),
    NotAuthentic("comet.other_chain" | "comet.validators_mismatch" | "comet.overlap_missing", or as
    commit.require_power). Only after "comet.overlap_missing" a header in between may help.
    """
    require_trust(trusted, rules)  # 1
    _well_placed(trusted, new, rules)  # 2
    _own_validators(new)  # 3
    if new.height == trusted.height + 1:  # 4
        _announced(trusted, new)
    signed = commit.require_power(new.signed, new.validators)  # 5
    if new.height != trusted.height + 1:  # 4: of those whose signatures were just verified, once
        _overlap(trusted, signed)


def require_trust(trusted: LightBlock, rules: Rules) -> None:
    """Raises Refused("comet.trust_expired")."""
    expires_ns = trusted.signed.header.time_ns + rules.trusting_period_s * NANOSECONDS
    if expires_ns <= rules.now_ns:
        raise Refused(
            "comet.trust_expired",
            "the trusted header is older than the trusting period",
            expected=f"< {rules.trusting_period_s} s",
            got=f"{(rules.now_ns - trusted.signed.header.time_ns) // NANOSECONDS} s",
            remedy="get the trust file of this ledger again, from somebody you trust",
        )


def _well_placed(trusted: LightBlock, new: LightBlock, rules: Rules) -> None:
    before, after = trusted.signed.header, new.signed.header
    if after.chain_id != before.chain_id:
        raise NotAuthentic(
            "comet.other_chain", "the header is of another chain", expected=before.chain_id, got=after.chain_id
        )
    if after.height <= before.height or after.time_ns <= before.time_ns:
        raise Refused(
            "comet.not_later", "the header is not later than the trusted one", expected=before.height, got=after.height
        )
    if after.time_ns >= rules.now_ns + MAX_DRIFT_S * NANOSECONDS:
        raise Refused("comet.from_future", "the header is from the future", expected=rules.now_ns, got=after.time_ns)


def _own_validators(new: LightBlock) -> None:
    if new.validators.hash() != new.signed.header.validators_hash:
        raise NotAuthentic(
            "comet.validators_mismatch",
            "the validators that came with the header are not the ones it names",
            expected=new.signed.header.validators_hash,
            got=new.validators.hash(),
        )


def _announced(trusted: LightBlock, new: LightBlock) -> None:
    if trusted.signed.header.next_validators_hash != new.signed.header.validators_hash:
        raise NotAuthentic(
            "comet.validators_mismatch",
            "the next header has other validators than the trusted one announced",
            expected=trusted.signed.header.next_validators_hash,
            got=new.signed.header.validators_hash,
        )


def _overlap(trusted: LightBlock, signed: tuple[Validator, ...]) -> None:
    if trusted.next_validators.hash() != trusted.signed.header.next_validators_hash:
        raise NotAuthentic(
            "comet.validators_mismatch",
            "the next validators that came with the trusted header are not the ones it names",
            expected=trusted.signed.header.next_validators_hash,
            got=trusted.next_validators.hash(),
        )
    signing = {one.public_key for one in signed}
    power = sum(one.power for one in trusted.next_validators.validators if one.public_key in signing)
    if power * 3 <= trusted.next_validators.power:
        raise NotAuthentic(
            "comet.overlap_missing",
            "too few of the validators trusted signed the new header",
            expected=f"> 1/3 of {trusted.next_validators.power}",
            got=power,
            remedy="verify a header in between first",
        )
