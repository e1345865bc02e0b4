"""Evidence of an enclave inside a session: authentic, bound to this session, and of an acceptable guest.

What the guest is (measurement, chip, HOST_DATA) is not judged here: the launcher's ticket or the release rules do that, each
with its own refusal.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Final

from moorline.channel.session import Claim
from moorline.errors import Misconfigured, Refused
from moorline.evidence.snp import Product, TcbVersion, parse_report
from moorline.ledger.records import CONSORTIUM, RevocationKind
from moorline.policy.match import AtLeast, NotRequired, OneOf
from moorline.policy.snp import SnpPolicy, appraise_snp, require_snp, strict_policy
from moorline.services.broker import Broker
from moorline.services.broker_role import Revocable
from moorline.verification.snp import SnpClaims, endorsements_from_table, verify_snp
from moorline.verification.verified import Verified
from moorline.wire.session import EvidenceFormat

_JUDGED_NEXT: Final = NotRequired("compared with ticket or launch fields by the rules that follow")
_COMPONENTS: Final = (4, 5)


def appraise_enclave(broker: Broker, claim: Claim) -> Verified[SnpClaims]:
    """The verified claims of the guest at the other end. Raises `snp.*`, or Refused("session.format")."""
    if claim.format is not EvidenceFormat.SNP:
        raise Refused("session.format", "this role needs evidence of an enclave", expected="snp", got=claim.format)
    verified = verify_snp(
        parse_report(claim.evidence),
        endorsements_from_table(claim.endorsements),
        report_data=claim.binding,
        anchors=broker.anchors,
        now=broker.clock.now(),
    )
    policy = _policy(broker.settings.snp_minimum_tcb)
    require_snp(appraise_snp(verified, policy, simulated_allowed=broker.trust.simulated_allowed))
    return verified


@lru_cache(maxsize=4)
def _policy(minimum_tcb: tuple[int, ...]) -> SnpPolicy:
    return strict_policy(
        measurement=_JUDGED_NEXT,
        host_data=_JUDGED_NEXT,
        chip_id=_JUDGED_NEXT,
        product=OneOf(frozenset(Product)),
        minimum_tcb=AtLeast(_minimum_tcb(minimum_tcb)),
    )


def revocable_enclave(measurement: bytes, chip: bytes) -> tuple[Revocable, ...]:
    """What can be revoked about an enclave: its code and its chip, by the consortium."""
    found: list[Revocable] = [(RevocationKind.MEASUREMENT, CONSORTIUM, measurement.hex())]
    if chip:
        found.append((RevocationKind.CHIP, CONSORTIUM, chip.hex()))
    return tuple(found)


def _minimum_tcb(components: tuple[int, ...]) -> TcbVersion:
    if len(components) not in _COMPONENTS:
        raise Misconfigured(
            "broker.settings",
            "snp_minimum_tcb is missing or not whole",
            expected="[boot_loader, tee, snp, microcode] and fmc from Turin on",
            got=components,
        )
    return TcbVersion(
        boot_loader=components[0],
        tee=components[1],
        snp=components[2],
        microcode=components[3],
        fmc=components[4] if len(components) > _COMPONENTS[0] else None,
    )
