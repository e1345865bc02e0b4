"""What vendors say about hardware, as items of a store: names, needs, freshness, and never going back. Numbered once here.

1. An item has a name: its kind, its subject, and for Intel's statements a track. Kind and subject are what the item's own
   signed content says; an item that says something else than its name is refused. [collateral.other_item]
   A track says which of Intel's evaluations was asked for: `standard`, `early`, or a number. The first two are the word of
   whoever fetched it, since Intel's statement does not say; a number must be the one in the statement.
2. An item is judged before it is stored: authentic under the anchors given, not revoked, and current at `now`. Intel's
   statements are judged with Intel's root CRL, so that one comes first. [collateral.root_crl_missing and the codes of
   verification.intel_*, verification.snp and verification.tpm_revocation]
3. A store remembers for each name how far it has come, and keeps that memory when the item is gone: evaluation number,
   issue date and CRL number never go back, none of the three. [collateral.rollback]
4. One position has one content: a statement or CRL that stands where another one stood, but says something else, is
   refused, whoever signed it. [collateral.contradiction]
5. A piece of evidence names what it needs by its own untrusted words: a chip, a platform family, an authority. That is
   good for looking things up and for nothing else.

Not established here: that an item is the newest there is. Rule 3 keeps an attacker from showing older items than one has
seen, and expiry bounds how long he can keep newer ones away.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from moorline.clock import Instant, Validity, rendered
from moorline.errors import Malformed, Refused
from moorline.evidence import snp
from moorline.evidence.dcap_quote import TeeType, tee_of
from moorline.evidence.sgx_quote import parse_sgx_quote
from moorline.evidence.snp import Product, SigningKey, SnpReport
from moorline.evidence.tdx_quote import parse_tdx_quote
from moorline.rats import EvidenceRoot
from moorline.verification import sgx, tdx
from moorline.verification.intel_pck import PckCa
from moorline.verification.intel_quote import IntelNeeded

STANDARD: Final = "standard"
EARLY: Final = "early"
TURIN_HWID_BYTES: Final = 8

_LINES: Final = "|".join(product.value for product in Product)
_TRACK: Final = r"standard|early|[0-9]{1,9}"


class ItemKind(StrEnum):
    """What there is to store. Root certificates are not among it: they come with the package."""

    SNP_VCEK = "snp-vcek"
    SNP_CHAIN = "snp-chain"
    SNP_CRL = "snp-crl"
    INTEL_TCB_INFO = "intel-tcb-info"
    INTEL_ENCLAVE_IDENTITY = "intel-enclave-identity"
    INTEL_EVALUATIONS = "intel-evaluations"
    INTEL_PCK_CRL = "intel-pck-crl"
    INTEL_ROOT_CRL = "intel-root-crl"
    TPM_CRL = "tpm-crl"


TRACKED: Final = frozenset({ItemKind.INTEL_TCB_INFO, ItemKind.INTEL_ENCLAVE_IDENTITY})

_SUBJECTS: Final = {
    ItemKind.SNP_VCEK: r"(?:(?:Milan|Genoa)/[0-9a-f]{128}|Turin/[0-9a-f]{16})/[0-9a-f]{16}",
    ItemKind.SNP_CHAIN: rf"(?:{_LINES})/(?:vcek|vlek)",
    ItemKind.SNP_CRL: rf"(?:{_LINES})/(?:vcek|vlek)",
    ItemKind.INTEL_TCB_INFO: r"(?:sgx|tdx)/[0-9a-f]{12}",
    ItemKind.INTEL_ENCLAVE_IDENTITY: r"sgx|tdx",
    ItemKind.INTEL_EVALUATIONS: r"sgx|tdx",
    ItemKind.INTEL_PCK_CRL: r"platform|processor",
    ItemKind.INTEL_ROOT_CRL: r"root",
    ItemKind.TPM_CRL: r"[0-9a-f]{64}",
}


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class ItemName:
    """Rule 1. Text: `<kind>/<subject>` or `<kind>/<subject>/<track>`, safe as a relative path.

    Raises Malformed("collateral.name") where a part is not of its form, so that a name can never lead out of a folder.
    """

    kind: ItemKind
    subject: str
    track: str = ""

    def __post_init__(self) -> None:
        tracked = self.kind in TRACKED
        subject_fits = re.fullmatch(_SUBJECTS[self.kind], self.subject, re.ASCII) is not None
        track_fits = re.fullmatch(_TRACK, self.track, re.ASCII) is not None if tracked else not self.track
        if not (subject_fits and track_fits):
            raise Malformed("collateral.name", "not the name of an item", got=f"{self.kind}/{self.subject}/{self.track}")

    def __str__(self) -> str:
        return "/".join(part for part in (self.kind.value, self.subject, self.track) if part)

    @classmethod
    def parse(cls, text: str) -> ItemName:
        """The name that `str` made this text of. Raises Malformed("collateral.name")."""
        kind, _, rest = text.partition("/")
        if kind not in set(ItemKind):
            raise Malformed("collateral.name", "an item of unknown kind", got=text)
        subject, _, track = rest.rpartition("/") if ItemKind(kind) in TRACKED else (rest, "", "")
        return cls(kind=ItemKind(kind), subject=subject, track=track)


# ---------------------------------------------------------------- 3 and 4: never going back


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """What holds about an item that was judged at one time. `validity` is until its next update, or a certificate's end.

    `evaluation` is Intel's evaluation number, `number` a CRL's; None where such an item has none. `content` is the digest of
    what was signed, None for certificates, which a vendor signs anew with the same content. `endorses` is for people.
    """

    name: ItemName
    issued: Instant
    validity: Validity
    evaluation: int | None
    number: int | None
    content: bytes | None
    root: EvidenceRoot
    endorses: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Mark:
    """How far a store has come with one name."""

    issued: Instant
    evaluation: int | None
    number: int | None
    content: bytes | None

    def position(self) -> tuple[int, int, int]:
        """The three numbers that never go back; what is missing counts as less than anything."""
        return (self.issued, -1 if self.evaluation is None else self.evaluation, -1 if self.number is None else self.number)


def advance(mark: Mark | None, judged: Judged) -> Mark:
    """The mark after `judged` was stored. Raises Refused("collateral.rollback" | "collateral.contradiction")."""
    new = Mark(issued=judged.issued, evaluation=judged.evaluation, number=judged.number, content=judged.content)
    if mark is None:
        return new
    if any(now < before for now, before in zip(new.position(), mark.position(), strict=True)):  # 3
        raise Refused(
            "collateral.rollback",
            "the item is older than the one that was held before",
            expected=f">= {_position(mark)}",
            got=_position(new),
            remedy="fetch it again; if that does not help, somebody serves you old items",
        )
    if new.position() == mark.position() and new.content != mark.content:  # 4
        raise Refused(
            "collateral.contradiction",
            "the vendor's key has said two different things at the same position",
            expected=mark.content,
            got=new.content,
            remedy="keep both files and ask the vendor: this must not happen",
        )
    return new


class Freshness(StrEnum):
    """Whether an item is current."""

    NOT_YET_VALID = "not-yet-valid"
    CURRENT = "current"
    EXPIRED = "expired"


def freshness(validity: Validity, now: Instant) -> Freshness:
    """Where `now` lies. Both ends of a validity are in it."""
    if now < validity.not_before:
        return Freshness.NOT_YET_VALID
    return Freshness.CURRENT if now <= validity.not_after else Freshness.EXPIRED


def _position(mark: Mark) -> str:
    evaluation = "" if mark.evaluation is None else f", evaluation {mark.evaluation}"
    number = "" if mark.number is None else f", number {mark.number}"
    return f"{rendered(mark.issued)}{evaluation}{number}"


# ---------------------------------------------------------------- 5: needs


@dataclass(frozen=True, slots=True, kw_only=True)
class Need:
    """One thing that evidence needs. Any of `items` answers it, the first is the likeliest.

    Where `required` is false a verdict is possible without it, and says what was not looked at.
    """

    items: tuple[ItemName, ...]
    why: str
    required: bool


def needs_of(evidence: bytes, *, track: str = STANDARD) -> tuple[Need, ...]:
    """What raw evidence needs: an SNP report, an SGX or TDX quote. Nothing for evidence that carries its endorsements.

    Input is untrusted. Raises Malformed for a report or quote that is none, and Unavailable("intel.endorsement_missing") for
    a quote that does not name its platform in a way that can be looked up.
    """
    if len(evidence) == snp.REPORT_BYTES:
        return needs_of_snp(snp.parse_report(evidence))
    try:
        tee = tee_of(evidence)
    except Malformed:
        return ()
    if tee is TeeType.SGX:
        return needs_of_quote(sgx.endorsements_needed(parse_sgx_quote(evidence)), track=track)
    return needs_of_quote(tdx.endorsements_needed(parse_tdx_quote(evidence)), track=track)


def needs_of_snp(report: SnpReport, product: Product | None = None) -> tuple[Need, ...]:
    """What an SNP report needs. A version 2 report does not say of which product it is, so all are candidates.

    A masked chip id names no VCEK, and a VLEK comes from the cloud provider, with the evidence.
    """
    if product is None and report.cpuid_fam_id is not None and report.cpuid_mod_id is not None:
        product = snp.product_of_cpuid(report.cpuid_fam_id, report.cpuid_mod_id)
    lines = tuple(Product) if product is None else (product,)
    key = "vlek" if report.signing_key is SigningKey.VLEK else "vcek"
    revocation = Need(
        items=tuple(ItemName(kind=ItemKind.SNP_CRL, subject=f"{line}/{key}") for line in lines),
        why="says which of AMD's authorities are revoked",
        required=False,
    )
    chain = Need(
        items=tuple(ItemName(kind=ItemKind.SNP_CHAIN, subject=f"{line}/{key}") for line in lines),
        why="the authority between chip and root, where it is not the one that comes with this package",
        required=False,
    )
    if key == "vlek" or not any(report.chip_id):
        return (chain, revocation)
    leaf = Need(
        items=tuple(vcek_name(line, report.chip_id, report.reported_tcb) for line in lines),
        why="the certificate of the chip's key at the reported TCB",
        required=True,
    )
    return (leaf, chain, revocation)


def vcek_name(product: Product, chip_id: bytes, tcb: int) -> ItemName:
    """The name of the VCEK of a chip at a TCB. On Turin the first eight bytes of CHIP_ID are the hwID (57230, 4.1)."""
    hwid = chip_id[:TURIN_HWID_BYTES] if product is Product.TURIN else chip_id
    return ItemName(kind=ItemKind.SNP_VCEK, subject=f"{product}/{hwid.hex()}/{tcb:016x}")


def needs_of_quote(needed: IntelNeeded, *, track: str = STANDARD) -> tuple[Need, ...]:
    """What an SGX or TDX quote needs, by what its unverified PCK certificate says."""
    tee = needed.tee.name.lower()
    authority = "platform" if needed.ca is PckCa.PLATFORM else "processor"
    wanted = (
        (ItemName(kind=ItemKind.INTEL_TCB_INFO, subject=f"{tee}/{needed.fmspc.hex()}", track=track), "rates the platform"),
        (ItemName(kind=ItemKind.INTEL_ENCLAVE_IDENTITY, subject=tee, track=track), "says which quoting enclave is Intel's"),
        (ItemName(kind=ItemKind.INTEL_PCK_CRL, subject=authority), "says which platforms are revoked"),
        (ItemName(kind=ItemKind.INTEL_ROOT_CRL, subject="root"), "says which of Intel's authorities are revoked"),
    )
    return tuple(Need(items=(item,), why=why, required=True) for item, why in wanted)


def missing(needs: tuple[Need, ...], names: Collection[ItemName]) -> tuple[Need, ...]:
    """The needs that none of `names` answers."""
    return tuple(need for need in needs if not any(item in names for item in need.items))
