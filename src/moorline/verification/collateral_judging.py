"""Judging one item of collateral, before it may be stored: rules 1 and 2 of `verification.collateral`.

The forms in which items are kept and travel are those in which vendors answer, with what their answers carry in headers:

    snp-vcek                  the certificate, DER
    snp-chain                 ASK or ASVK, then ARK, PEM (AMD KDS `cert_chain`)
    snp-crl, intel-root-crl   the CRL, DER
    tpm-crl                   as Intel's CRL: the issuer chain begins with the authority that signed the CRL
    intel-*                   {"<statement>": "<answer>", "issuer_chain": "<PEM>"}, JSON: `tcb_info_json`,
                              `enclave_identity_json`, `tcb_evaluation_data_numbers_json`, or `crl_data_base64` (DER)

All input is untrusted. Everything is judged anew each time: a store is not believed.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from cryptography import x509

from moorline.clock import Instant, Validity, rendered
from moorline.errors import Malformed, NotAuthentic, Unavailable
from moorline.evidence import intel_collateral as evidence
from moorline.evidence.intel_collateral import SignedDocument
from moorline.evidence.snp import Product
from moorline.rats import EvidenceRoot
from moorline.verification.anchors import AnchorSet
from moorline.verification.collateral import EARLY, STANDARD, ItemKind, ItemName, Judged, vcek_name
from moorline.verification.intel_collateral import (
    JudgedStatement,
    Statement,
    verify_evaluation_numbers,
    verify_qe_identity,
    verify_tcb_info,
)
from moorline.verification.intel_endorsements import assemble
from moorline.verification.intel_pck import (
    IntelAnchors,
    IntelCrl,
    PckCa,
    certificates_in_force,
    crl_in_force,
    judge_authority,
    judge_crl,
    judge_root_crl,
    not_revoked,
    pem_certificates,
)
from moorline.verification.snp import SnpEndorsements, judge_snp_authority, judge_snp_crl, verify_snp_chain
from moorline.verification.tpm_identity import TpmAnchor, authority_path
from moorline.verification.tpm_revocation import Revocation, in_force, is_by, item_subject, judge_path, parse_tpm_crl
from moorline.wire.certificates import parse_certificate

MAX_ITEM: Final = 4 << 20
TCB_INFO: Final = "tcb_info_json"
ENCLAVE_IDENTITY: Final = "enclave_identity_json"
EVALUATIONS: Final = "tcb_evaluation_data_numbers_json"
CRL: Final = "crl_data_base64"
ISSUER_CHAIN: Final = "issuer_chain"

_TEE_OF_ENCLAVE: Final = {"QE": "sgx", "TD_QE": "tdx"}
_CA_OF: Final = {PckCa.PLATFORM: "platform", PckCa.PROCESSOR: "processor"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Anchors:
    """All roots that collateral may rest on. There is no default."""

    snp: AnchorSet
    intel: IntelAnchors
    tpm: tuple[TpmAnchor, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """What a store already holds that judging an item takes: untrusted, and judged again here.

    Intel's root CRL; for a chip of AMD's, authorities that are not the ones in the package (DER), and a CRL; for a TPM
    maker's CRL those of its other authorities.
    """

    root_crl: bytes | None
    authorities: tuple[bytes, ...] = ()
    snp_crl: bytes | None = None
    tpm_crls: tuple[bytes, ...] = ()


def judge(name: ItemName, data: bytes, *, anchors: Anchors, held: Held, now: Instant) -> Judged:
    """The item, authentic, not revoked, current at `now`, and the one its name says.

    Raises Malformed, NotAuthentic (`snp.*`, `intel.*`, `ek.*`, `collateral.other_item`, `collateral.expired`,
    `collateral.not_yet_valid`), Unavailable("collateral.root_crl_missing").
    """
    if len(data) > MAX_ITEM:
        raise Malformed("collateral.item_too_large", "an item is too large", expected=f"<= {MAX_ITEM} bytes", got=len(data))
    return _JUDGES[name.kind](name, data, anchors, held, now)


def packed(member: str, answer: str, issuer_chain: str) -> bytes:
    """One of Intel's answers with the issuer chain of its header, as an item. `member` is one of the names above."""
    return json.dumps({ISSUER_CHAIN: issuer_chain, member: answer}, ensure_ascii=True).encode("ascii")


def packed_crl(crl_der: bytes, issuer_chain: str) -> bytes:
    """A PCK authority's CRL with its issuer chain, as an item."""
    return packed(CRL, base64.b64encode(crl_der).decode("ascii"), issuer_chain)


def tcb_info_document(data: bytes) -> SignedDocument:
    """The statement in an `intel-tcb-info` item, unverified. Raises Malformed."""
    document = assemble([("pcs-response-json", data)]).tcb_info
    if document is None:
        raise Malformed("collateral.item_malformed", "an item without its statement", expected=TCB_INFO)
    return document


def enclave_identity_document(data: bytes) -> SignedDocument:
    """The statement in an `intel-enclave-identity` item, unverified. Raises Malformed."""
    document = assemble([("pcs-response-json", data)]).qe_identity
    if document is None:
        raise Malformed("collateral.item_malformed", "an item without its statement", expected=ENCLAVE_IDENTITY)
    return document


def evaluations_document(data: bytes) -> SignedDocument:
    """The statement in an `intel-evaluations` item, unverified. Raises Malformed."""
    members = _members(data, EVALUATIONS)
    return evidence.signed_document(members[EVALUATIONS].encode(), chain=members[ISSUER_CHAIN].encode())


# ---------------------------------------------------------------- AMD


def _vcek(name: ItemName, data: bytes, anchors: Anchors, held: Held, now: Instant) -> Judged:
    offered = SnpEndorsements(leaf=data, intermediates=held.authorities, crl=held.snp_crl)
    chain = verify_snp_chain(offered, anchors=anchors.snp, now=now)
    leaf = chain.leaf
    if leaf.hwid is None:
        raise NotAuthentic("collateral.other_item", "the certificate names no chip", expected=name)
    _is(name, vcek_name(leaf.product, leaf.hwid, leaf.tcb.raw()))
    validity = next(period for role, period in chain.validity if role == "chip")
    return _certificate(name, validity, chain.root, f"the key of one {leaf.product} chip at {leaf.tcb}")


def _chain(name: ItemName, data: bytes, anchors: Anchors, _: Held, now: Instant) -> Judged:
    try:
        certificates = pem_certificates(data)
    except Malformed as error:  # the reader is Intel's, and so is its code
        raise Malformed("collateral.item_malformed", "not a chain of AMD's", got=error.says) from None
    if len(certificates) != 2:
        raise Malformed("collateral.item_malformed", "a chain of AMD's holds two certificates", got=len(certificates))
    found = judge_snp_authority(*certificates, anchors=anchors.snp)
    key = "vlek" if "VLEK" in found.common_name else "vcek"
    _is(name, ItemName(kind=ItemKind.SNP_CHAIN, subject=f"{found.product}/{key}"))
    _current(found.validity, now)
    return _certificate(name, found.validity, found.root, f"the authority over {key.upper()} of {found.product}")


def _snp_crl(name: ItemName, data: bytes, anchors: Anchors, _: Held, now: Instant) -> Judged:
    line = Product(name.subject.partition("/")[0])
    found = judge_snp_crl(data, line, anchors=anchors.snp)
    _current(found.validity, now)
    return Judged(
        name=name,
        issued=found.validity.not_before,
        validity=found.validity,
        evaluation=None,
        number=found.crl_number,
        content=_signed_part(data),
        root=found.root,
        endorses=f"which authorities of {line} AMD revoked",
    )


# ---------------------------------------------------------------- Intel


def _tcb_info(name: ItemName, data: bytes, anchors: Anchors, held: Held, now: Instant) -> Judged:
    judged = verify_tcb_info(tcb_info_document(data), root_crl=_root(held), anchors=anchors.intel, now=now)
    info = judged.value
    track = _track(name, info.evaluation)
    _is(name, ItemName(kind=name.kind, subject=f"{info.id.lower()}/{info.fmspc.hex()}", track=track))
    return _statement(name, judged, info.evaluation, f"{info.id} platforms of FMSPC {info.fmspc.hex()}")


def _enclave_identity(name: ItemName, data: bytes, anchors: Anchors, held: Held, now: Instant) -> Judged:
    judged = verify_qe_identity(enclave_identity_document(data), root_crl=_root(held), anchors=anchors.intel, now=now)
    identity = judged.value
    tee = _TEE_OF_ENCLAVE.get(identity.id)
    if tee is None:
        raise NotAuthentic("collateral.other_item", "the identity is of no quoting enclave", expected=name, got=identity.id)
    _is(name, ItemName(kind=name.kind, subject=tee, track=_track(name, identity.evaluation)))
    return _statement(name, judged, identity.evaluation, f"Intel's quoting enclave for {tee.upper()}")


def _evaluations(name: ItemName, data: bytes, anchors: Anchors, held: Held, now: Instant) -> Judged:
    judged = verify_evaluation_numbers(evaluations_document(data), root_crl=_root(held), anchors=anchors.intel, now=now)
    numbers = judged.value
    if numbers.id.lower() != name.subject:
        raise NotAuthentic("collateral.other_item", "the list is for another TEE", expected=name, got=numbers.id)
    newest = max((number for number, _, _ in numbers.numbers), default=None)
    return _statement(name, judged, newest, f"which TCB evaluations there are for {numbers.id}")


def _pck_crl(name: ItemName, data: bytes, anchors: Anchors, held: Held, now: Instant) -> Judged:
    members = _members(data, CRL)
    der = _der(members[CRL])
    authority = judge_authority(members[ISSUER_CHAIN].encode(), anchors.intel)
    revocations = judge_crl(_root(held), authority.root_issuer)
    not_revoked(revocations, authority.serial)
    crl_in_force(revocations, now)
    certificates_in_force(authority.validity, now)
    crl = judge_crl(der, authority.issuer)
    crl_in_force(crl, now)
    _is(name, ItemName(kind=name.kind, subject=_CA_OF[authority.ca]))
    return _intel_crl(
        name, der, crl, authority.root, f"which platforms of the {_CA_OF[authority.ca]} authority Intel revoked"
    )


# ---------------------------------------------------------------- makers of TPMs


def tpm_crl_of(data: bytes) -> bytes:
    """The CRL in a `tpm-crl` item, unverified. Raises Malformed("collateral.item_malformed")."""
    return _der(_members(data, CRL)[CRL])


def _tpm_crl(name: ItemName, data: bytes, anchors: Anchors, held: Held, now: Instant) -> Judged:
    members = _members(data, CRL)
    der = _der(members[CRL])
    try:
        chain = [parse_certificate(one) for one in pem_certificates(members[ISSUER_CHAIN].encode())]
    except Malformed:
        raise Malformed("collateral.item_malformed", "the issuer chain of a CRL does not decode", got=name) from None
    anchor, path = authority_path(chain, anchors=anchors.tpm, now=now)
    known = Revocation(crls=held.tpm_crls, not_required={anchor.root: "the lists of other authorities may come later"})
    judge_path(path, known, known=(), root=anchor.root, now=now)
    crl = parse_tpm_crl(der)
    if not is_by(crl, path[0]):
        raise NotAuthentic("ek.crl_signature", "the CRL is not signed by the authority that its chain begins with", got=name)
    in_force(crl, now)
    _is(name, ItemName(kind=name.kind, subject=item_subject(path[0])))
    return Judged(
        name=name,
        issued=crl.validity.not_before,
        validity=crl.validity,
        evaluation=None,
        number=crl.number,
        content=crl.digest,
        root=anchor.root,
        endorses=f"which certificates the maker of TPMs revoked: {path[0].subject.rfc4514_string()}",
    )


def _der(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except ValueError:
        raise Malformed("collateral.item_malformed", "a CRL that is no base64") from None


def _root_crl(name: ItemName, data: bytes, anchors: Anchors, _: Held, now: Instant) -> Judged:
    crl, root = judge_root_crl(data, anchors.intel)
    crl_in_force(crl, now)
    return _intel_crl(name, data, crl, root, "which of its authorities Intel revoked")


_JUDGES: Final[dict[ItemKind, Callable[[ItemName, bytes, Anchors, Held, Instant], Judged]]] = {
    ItemKind.SNP_VCEK: _vcek,
    ItemKind.SNP_CHAIN: _chain,
    ItemKind.SNP_CRL: _snp_crl,
    ItemKind.INTEL_TCB_INFO: _tcb_info,
    ItemKind.INTEL_ENCLAVE_IDENTITY: _enclave_identity,
    ItemKind.INTEL_EVALUATIONS: _evaluations,
    ItemKind.INTEL_PCK_CRL: _pck_crl,
    ItemKind.INTEL_ROOT_CRL: _root_crl,
    ItemKind.TPM_CRL: _tpm_crl,
}


# ---------------------------------------------------------------- parts


def _is(name: ItemName, found: ItemName) -> None:
    """Rule 1."""
    if name != found:
        raise NotAuthentic("collateral.other_item", "the item is another one than its name says", expected=name, got=found)


def _track(name: ItemName, evaluation: int | None) -> str:
    """The track as the statement allows it: a name with a number must have the statement's."""
    return name.track if name.track in (STANDARD, EARLY) else str(evaluation)


def _current(validity: Validity, now: Instant) -> None:
    if now < validity.not_before:
        raise NotAuthentic(
            "collateral.not_yet_valid",
            "the item is not valid yet",
            expected=f">= {rendered(validity.not_before)}",
            got=rendered(now),
            remedy="look at this machine's clock",
        )
    if now > validity.not_after:
        raise NotAuthentic(
            "collateral.expired",
            "the item has expired",
            expected=f"<= {rendered(validity.not_after)}",
            got=rendered(now),
            remedy="fetch it again",
        )


def _root(held: Held) -> bytes:
    if held.root_crl is None:
        raise Unavailable(
            "collateral.root_crl_missing",
            "without Intel's root CRL nobody knows whether the signer was revoked",
            remedy="fetch or import intel-root-crl/root first",
        )
    return held.root_crl


def _members(data: bytes, statement: str) -> dict[str, str]:
    value = evidence.parse_json(data)
    if not isinstance(value, dict) or set(value) != {statement, ISSUER_CHAIN}:
        raise Malformed("collateral.item_malformed", "not an item of its kind", expected=f"{statement}, {ISSUER_CHAIN}")
    found = {str(name): text for name, text in value.items() if isinstance(text, str)}
    if len(found) != len(value):
        raise Malformed("collateral.item_malformed", "a member that is no string", expected=f"{statement}, {ISSUER_CHAIN}")
    return found


def _certificate(name: ItemName, validity: Validity, root: EvidenceRoot, endorses: str) -> Judged:
    return Judged(
        name=name,
        issued=validity.not_before,
        validity=validity,
        evaluation=None,
        number=None,
        content=None,
        root=root,
        endorses=endorses,
    )


def _signed_part(crl_der: bytes) -> bytes:
    """The digest of what was signed in a CRL that was judged: a signature made anew does not change it."""
    return hashlib.sha256(x509.load_der_x509_crl(crl_der).tbs_certlist_bytes).digest()


def _intel_crl(name: ItemName, der: bytes, crl: IntelCrl, root: EvidenceRoot, endorses: str) -> Judged:
    return Judged(
        name=name,
        issued=crl.validity.not_before,
        validity=crl.validity,
        evaluation=None,
        number=crl.number,
        content=_signed_part(der),
        root=root,
        endorses=endorses,
    )


def _statement(name: ItemName, judged: JudgedStatement[Statement], evaluation: int | None, endorses: str) -> Judged:
    signer = judged.signer
    assert signer is not None  # the verify functions ask for one
    return Judged(
        name=name,
        issued=judged.validity.not_before,
        validity=judged.validity,
        evaluation=evaluation,
        number=None,
        content=judged.digest,
        root=signer.root,
        endorses=endorses,
    )
