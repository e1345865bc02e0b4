"""Is an SNP attestation report authentic, current and bound to this challenge? Numbered once here, named in the code below.

Input: a parsed, untrusted report; untrusted endorsements (the leaf certificate and intermediates, usually from the host);
the 64 bytes of report data that this verifier expects; pinned anchors; the time. Nothing is fetched, no clock is read.

1.  The report is signed at all: signature algorithm 1 (ECDSA P-384 with SHA-384, 56860 table 139), chip key not masked,
    signing key VCEK or VLEK.                                                    snp.algorithm_unsupported snp.unsigned
2.  The leaf, the intermediate and the pinned ARK form a chain of exactly three certificates, signed RSA-PSS with SHA-384
    and a salt of 48 bytes (57230, 3): ARK by itself, the CA below it by ARK, the leaf by that CA. The ARK is one of the
    anchors of the product that the leaf names; names alone open nothing.  snp.chain_broken snp.anchor_unknown
3.  The leaf holds a P-384 key and the VCEK extensions of 57230, each once, well-formed.
                                       snp.certificate_malformed snp.leaf_key snp.tcb_missing snp.hwid_missing
4.  The leaf is of the kind the report says: a VCEK has hwID and no CSP_ID, a VLEK the reverse; a missing one refuses.
                                                                                  snp.signer_mismatch snp.hwid_missing
5.  The ECDSA signature holds over the first 0x2A0 bytes of the report.                            snp.signature_invalid
6.  Every certificate of the chain is valid at `now`: judged at each call, never remembered.
                                                                snp.certificate_expired snp.certificate_not_yet_valid
7.  If a CRL is given, the pinned ARK signed it, it is current at `now`, and it names neither CA nor leaf.
                                                          snp.crl_invalid snp.crl_malformed snp.crl_not_yet_valid
                                                          snp.crl_stale snp.revoked
8.  The product of the certificate is the product of the report's CPUID (version 3 and later).      snp.product_mismatch
9.  hwID equals CHIP_ID. A masked CHIP_ID (all zero) passes without naming a chip: `chip_id` is None and policy decides.
    A VLEK names no chip either.                                                                       snp.chip_mismatch
10. The TCB of the certificate equals the reported TCB, component by component.                         snp.tcb_mismatch
11. All 64 bytes of report data equal the expected ones, compared in constant time.        snp.report_data_mismatch

Not established here: whether the guest may run with debug, which measurement, HOST_DATA or TCB is acceptable: that is
`policy.snp`. Freshness is that of `report_data`: whoever calls must have put a fresh challenge into it.

Step 2 and 3 depend on bytes only and cost two RSA verifications, so their result is kept per (leaf, intermediates, anchors),
bounded; a failure is never kept. A warm verification costs one P-384 verification and little else.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
from cryptography.utils import CryptographyDeprecationWarning
from cryptography.x509.oid import NameOID, SignatureAlgorithmOID

from moorline import digest
from moorline.clock import Instant, Validity, rendered
from moorline.errors import Malformed, NotAuthentic, Unavailable
from moorline.evidence import snp as evidence
from moorline.evidence.snp import Product, SigningKey, SnpReport, TcbVersion
from moorline.rats import EvidenceRoot
from moorline.verification.anchors import AnchorSet, SnpAnchor
from moorline.verification.verified import Verified

_AMD: Final = "1.3.6.1.4.1.3704.1"
_PRODUCT_NAME: Final = f"{_AMD}.2"
_BOOT_LOADER: Final = f"{_AMD}.3.1"
_TEE: Final = f"{_AMD}.3.2"
_SNP: Final = f"{_AMD}.3.3"
_RESERVED_SPL: Final = tuple(f"{_AMD}.3.{number}" for number in (4, 5, 6, 7))
_MICROCODE: Final = f"{_AMD}.3.8"
_FMC: Final = f"{_AMD}.3.9"
_HWID: Final = f"{_AMD}.4"
_CSP_ID: Final = f"{_AMD}.5"

_PSS: Final = padding.PSS(mgf=padding.MGF1(hashes.SHA384()), salt_length=48)
_ECDSA: Final = ec.ECDSA(hashes.SHA384())
_MASKED: Final = bytes(64)
_COMMON_NAME: Final = {SigningKey.VCEK: "SEV-VCEK", SigningKey.VLEK: "SEV-VLEK"}
_MAX_INTERMEDIATES: Final = 4
_MAX_CERTIFICATE: Final = 8192


@dataclass(frozen=True, slots=True, kw_only=True)
class SnpEndorsements:
    """What vouches for the signing key, DER and untrusted: the VCEK or VLEK, CAs that may lead to the ARK, a CRL or None."""

    leaf: bytes
    intermediates: tuple[bytes, ...]
    crl: bytes | None


@dataclass(frozen=True, slots=True, kw_only=True)
class SnpClaims:
    """What an authentic report says, with what only its certificate could add.

    `chip_id` is None where no chip is proven (masked, or VLEK); `csp_id` names the cloud provider of a VLEK. HOST_DATA and
    measurement are facts about the launch, not yet acceptable to anybody. `revocation_checked` says whether rule 7 ran.
    """

    report: SnpReport
    product: Product
    signer: SigningKey
    chip_id: bytes | None
    csp_id: str | None
    current_tcb: TcbVersion
    reported_tcb: TcbVersion
    committed_tcb: TcbVersion
    launch_tcb: TcbVersion
    revocation_checked: bool

    @property
    def measurement(self) -> bytes:
        """The launch digest, 48 bytes."""
        return self.report.measurement

    @property
    def host_data(self) -> bytes:
        """What the host put in at launch, 32 bytes."""
        return self.report.host_data

    @property
    def report_data(self) -> bytes:
        """What the guest put in for this report, 64 bytes; equal to what the verifier expected."""
        return self.report.report_data


def endorsements_from_table(auxblob: bytes) -> SnpEndorsements:
    """The endorsements in a GHCB certificate table (configfs-tsm `auxblob`). The ARK in it is ignored: ours is pinned.

    Raises Malformed (`snp.table_*`), Malformed("snp.table_ambiguous") if it holds both a VCEK and a VLEK, and
    Unavailable("snp.leaf_missing") if neither: the host gave none, and no verdict is possible without.
    """
    table = evidence.parse_certificate_table(auxblob)
    vcek, vlek = table.first(evidence.VCEK_GUID), table.first(evidence.VLEK_GUID)
    if vcek is not None and vlek is not None:
        raise Malformed("snp.table_ambiguous", "the certificate table holds both a VCEK and a VLEK")
    leaf = vcek or vlek
    if leaf is None:
        raise Unavailable(
            "snp.leaf_missing",
            "the certificate table holds neither a VCEK nor a VLEK",
            remedy="load the chip's certificate into the host (snphost import), or fetch it from AMD's KDS",
        )
    ask = table.first(evidence.ASK_GUID)
    return SnpEndorsements(leaf=leaf, intermediates=() if ask is None else (ask,), crl=table.first(evidence.CRL_GUID))


def verify_snp(
    report: SnpReport,
    endorsements: SnpEndorsements,
    *,
    report_data: bytes,
    anchors: AnchorSet,
    now: Instant,
) -> Verified[SnpClaims]:
    """The claims of `report`, authentic and bound to `report_data`, by the procedure of this module.

    `report_data` is all 64 bytes, from the verifier's own state, never from the evidence; it is not padded. Raises Malformed
    and NotAuthentic with the codes above. Does not judge acceptability.
    """
    if len(report_data) != evidence.REPORT_DATA_BYTES:
        raise Malformed(
            "snp.expected_report_data",
            "the expected report data is neither padded nor cut here",
            expected="64 bytes",
            got=len(report_data),
        )
    _signed_at_all(report)  # 1
    chain = _judge_chain(endorsements.leaf, endorsements.intermediates, anchors)  # 2 and 3, remembered
    leaf = chain.leaf
    if leaf.kind is not report.signing_key:  # 4
        raise NotAuthentic(
            "snp.signer_mismatch",
            "the certificate is not for the key that signed",
            expected=report.signing_key,
            got=leaf.kind,
        )
    _signature_holds(report, leaf.key)  # 5
    _in_force(chain.validity, now)  # 6
    if endorsements.crl is not None:
        _not_revoked(endorsements.crl, chain, now)  # 7
    _same_product(report, leaf.product)  # 8
    chip_id = _chip_of(report, leaf)  # 9
    reported = TcbVersion.parse(report.reported_tcb, leaf.product)
    if reported != leaf.tcb:  # 10
        raise NotAuthentic(
            "snp.tcb_mismatch", "the certificate is of another TCB than reported", expected=leaf.tcb, got=reported
        )
    if not digest.same(report.report_data, report_data):  # 11
        raise NotAuthentic(
            "snp.report_data_mismatch",
            "the report is not bound to this challenge",
            remedy="ask for a new report; a report made for another session or nonce cannot be used",
        )
    claims = SnpClaims(
        report=report,
        product=leaf.product,
        signer=leaf.kind,
        chip_id=chip_id,
        csp_id=leaf.csp_id,
        current_tcb=TcbVersion.parse(report.current_tcb, leaf.product),
        reported_tcb=reported,
        committed_tcb=TcbVersion.parse(report.committed_tcb, leaf.product),
        launch_tcb=TcbVersion.parse(report.launch_tcb, leaf.product),
        revocation_checked=endorsements.crl is not None,
    )
    collateral = chain.collateral_digest
    if endorsements.crl is not None:
        collateral = digest.tagged_hash("snp-collateral-with-crl", collateral, endorsements.crl)
    return Verified._create(claims, root=chain.root, collateral_digest=collateral)  # noqa: SLF001 - this room makes them


@dataclass(frozen=True, slots=True, kw_only=True)
class SnpLeaf:
    """What a VCEK or VLEK certificate says; believed only inside a verified chain."""

    key: ec.EllipticCurvePublicKey
    kind: SigningKey
    product: Product
    tcb: TcbVersion
    hwid: bytes | None
    csp_id: str | None
    serial: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SnpChain:
    """A chain that holds, at the times in `validity` only. `ark_key` signs CRLs."""

    leaf: SnpLeaf
    validity: tuple[tuple[str, Validity], ...]
    ark_key: rsa.RSAPublicKey
    ark_name: bytes
    ca_serial: int
    root: EvidenceRoot
    collateral_digest: bytes


def verify_snp_chain(endorsements: SnpEndorsements, *, anchors: AnchorSet, now: Instant) -> SnpChain:
    """The chain of `endorsements` (rules 2, 3, 6, 7) without a report, for collateral that is checked when it is stored."""
    chain = _judge_chain(endorsements.leaf, endorsements.intermediates, anchors)
    _in_force(chain.validity, now)
    if endorsements.crl is not None:
        _not_revoked(endorsements.crl, chain, now)
    return chain


@dataclass(frozen=True, slots=True, kw_only=True)
class SnpAuthority:
    """A CA between chips and a pinned root, or the root's CRL, that holds: whose it is and when. `crl_number` is a CRL's."""

    product: Product
    common_name: str
    validity: Validity
    root: EvidenceRoot
    crl_number: int | None


def judge_snp_authority(ca_der: bytes, ark_der: bytes, *, anchors: AnchorSet) -> SnpAuthority:
    """The CA of a `cert_chain` answer (57230, 4), signed by the pinned root that follows it there. Dates are not judged.

    Raises Malformed and NotAuthentic (`snp.*`). The root in the answer is only compared: it opens nothing.
    """
    ca = _certificate(ca_der)
    anchor = next((one for one in anchors.snp if one.ark == ark_der), None)
    if anchor is None:
        raise NotAuthentic("snp.anchor_unknown", "the chain does not end in a pinned root")
    _anchor_over(ca, AnchorSet(snp=(anchor,)), anchor.product)
    return SnpAuthority(
        product=anchor.product, common_name=_common_name(ca), validity=_validity(ca), root=anchor.root, crl_number=None
    )


def judge_snp_crl(crl_der: bytes, product: Product, *, anchors: AnchorSet) -> SnpAuthority:
    """AMD's CRL of one product line, signed by a pinned root of it, without a chip. Dates are not judged.

    Raises Malformed("snp.crl_malformed") and NotAuthentic("snp.crl_invalid").
    """
    crl = _crl(crl_der)
    for anchor in anchors.snp:
        ark = _certificate(anchor.ark)
        if anchor.product is product and ark.subject.public_bytes() == crl.issuer and _crl_signed_by(crl, _rsa(ark)):
            validity = Validity(not_before=crl.last_update, not_after=crl.next_update)
            return SnpAuthority(
                product=product, common_name=_common_name(ark), validity=validity, root=anchor.root, crl_number=crl.number
            )
    raise NotAuthentic("snp.crl_invalid", "the CRL is not signed by a pinned root of this product", expected=product)


# ---------------------------------------------------------------- 1, 5, 6, 8, 9: about the report


def _signed_at_all(report: SnpReport) -> None:
    if report.mask_chip_key or report.signing_key is SigningKey.NONE:
        raise NotAuthentic(
            "snp.unsigned",
            "the firmware did not sign this report: the chip key is masked",
            remedy="clear MASK_CHIP_KEY in the platform's SNP configuration",
        )
    if report.signature_algo != evidence.ECDSA_P384_SHA384:
        raise NotAuthentic(
            "snp.algorithm_unsupported", "unknown signature algorithm", expected="1 (P-384)", got=report.signature_algo
        )


def _signature_holds(report: SnpReport, key: ec.EllipticCurvePublicKey) -> None:
    signed = evidence.serialize_report(report)[: evidence.SIGNED_BYTES]
    try:
        key.verify(encode_dss_signature(report.signature_r, report.signature_s), signed, _ECDSA)
    except InvalidSignature:
        raise NotAuthentic("snp.signature_invalid", "the report is not signed by the chip its certificate names") from None


def _in_force(validity: tuple[tuple[str, Validity], ...], now: Instant) -> None:
    for name, interval in validity:
        if now < interval.not_before:
            raise NotAuthentic(
                "snp.certificate_not_yet_valid",
                f"the {name} certificate is not valid yet",
                expected=f">= {rendered(interval.not_before)}",
                got=rendered(now),
            )
        if now > interval.not_after:
            raise NotAuthentic(
                "snp.certificate_expired",
                f"the {name} certificate has expired",
                expected=f"<= {rendered(interval.not_after)}",
                got=rendered(now),
                remedy="fetch a current certificate for the chip from AMD's KDS",
            )


def _same_product(report: SnpReport, product: Product) -> None:
    if report.cpuid_fam_id is None or report.cpuid_mod_id is None:
        return  # version 2 names no product; its TCB layout and its chain are those of the certificate
    named = evidence.product_of_cpuid(report.cpuid_fam_id, report.cpuid_mod_id)
    if named is not product:
        raise NotAuthentic(
            "snp.product_mismatch",
            "the report is from another product line than its certificate",
            expected=product,
            got=named or f"family {report.cpuid_fam_id:#x} model {report.cpuid_mod_id:#x}",
        )


def _chip_of(report: SnpReport, leaf: SnpLeaf) -> bytes | None:
    if leaf.hwid is None or report.chip_id == _MASKED:
        return None
    if report.chip_id != leaf.hwid.ljust(64, b"\0"):  # Turin: 8 bytes of hwID, the rest of CHIP_ID is zero (56860 table 22)
        raise NotAuthentic("snp.chip_mismatch", "the report names another chip than its certificate")
    return report.chip_id


# ---------------------------------------------------------------- 2: the chain


@lru_cache(maxsize=1024)  # a pure function of bytes; only chains that hold are kept, so strangers cannot fill it
def _judge_chain(leaf_der: bytes, intermediates: tuple[bytes, ...], anchors: AnchorSet) -> SnpChain:
    if len(intermediates) > _MAX_INTERMEDIATES:
        raise Malformed("snp.chain_long", "too many intermediate certificates", expected=f"<= {_MAX_INTERMEDIATES}")
    leaf = _certificate(leaf_der)
    product = _product(leaf)
    ca, offered = _issuer(leaf, intermediates, tuple(anchor for anchor in anchors.snp if anchor.product is product))
    anchor, ark = _anchor_over(ca, anchors, product)
    ark_key = _rsa(ark)
    used = [ark.public_bytes(serialization.Encoding.DER), offered, leaf_der]
    return SnpChain(
        leaf=_leaf_facts(leaf, product),
        validity=tuple((name, _validity(cert)) for name, cert in (("ARK", ark), ("ASK", ca), ("chip", leaf))),
        ark_key=ark_key,
        ark_name=ark.subject.public_bytes(),
        ca_serial=_serial(ca),
        root=anchor.root,
        collateral_digest=hashlib.sha256(digest.tagged("snp-collateral", *used)).digest(),
    )


def _issuer(
    leaf: x509.Certificate, intermediates: tuple[bytes, ...], anchors: tuple[SnpAnchor, ...]
) -> tuple[x509.Certificate, bytes]:
    """The CA that signed `leaf`: one that was offered, or one known beside the anchors. Not yet trusted."""
    seen = False
    for der in (*intermediates, *(known for anchor in anchors for known in anchor.intermediates)):
        candidate = _certificate(der)
        if candidate.subject != leaf.issuer:
            continue
        seen = True
        if _signed_by(leaf, candidate):
            return candidate, der
    if seen:
        raise NotAuthentic("snp.chain_broken", "the chip's certificate is not signed by the CA it names")
    raise NotAuthentic(
        "snp.anchor_unknown",
        "the chip's certificate is from a CA that no trusted root vouches for",
        expected="a CA below a pinned AMD root of this product",
        remedy="a simulated chip is trusted only where its anchors file is configured",
    )


def _anchor_over(ca: x509.Certificate, anchors: AnchorSet, product: Product) -> tuple[SnpAnchor, x509.Certificate]:
    """The pinned root that signed `ca`."""
    _is_ca(ca)
    for anchor in anchors.snp:
        if anchor.product is not product:
            continue
        ark = _certificate(anchor.ark)
        if ark.subject == ca.issuer and _signed_by(ca, ark):
            if ark.subject != ark.issuer or not _signed_by(ark, ark):
                raise NotAuthentic("snp.anchor_not_self_signed", "a configured anchor is not a self-signed root")
            _is_ca(ark)
            return anchor, ark
    raise NotAuthentic(
        "snp.anchor_unknown",
        "the chip's certificate does not lead to a trusted root of its product",
        expected=f"a pinned root for {product}",
        remedy="a simulated chip is trusted only where its anchors file is configured",
    )


def _signed_by(certificate: x509.Certificate, issuer: x509.Certificate) -> bool:
    """True if the RSA key of `issuer` signed `certificate` with RSA-PSS, SHA-384, salt 48; never another algorithm."""
    key = issuer.public_key()
    if certificate.signature_algorithm_oid != SignatureAlgorithmOID.RSASSA_PSS or not isinstance(key, rsa.RSAPublicKey):
        return False
    try:
        key.verify(certificate.signature, certificate.tbs_certificate_bytes, _PSS, hashes.SHA384())
    except InvalidSignature:
        return False
    return True


def _is_ca(certificate: x509.Certificate) -> None:
    try:
        constraints = certificate.extensions.get_extension_for_class(x509.BasicConstraints).value
        usage = certificate.extensions.get_extension_for_class(x509.KeyUsage).value
    except Exception as error:  # absent, duplicate or undecodable extensions each have their own exception class
        raise NotAuthentic(
            "snp.chain_broken", "an issuer is not a certificate authority", got=type(error).__name__
        ) from None
    if not constraints.ca or not usage.key_cert_sign:
        raise NotAuthentic("snp.chain_broken", "an issuer may not sign certificates")


def _rsa(certificate: x509.Certificate) -> rsa.RSAPublicKey:
    key = certificate.public_key()
    assert isinstance(key, rsa.RSAPublicKey)  # _signed_by accepted a signature of it
    return key


def _validity(certificate: x509.Certificate) -> Validity:
    return Validity(
        not_before=Instant(int(certificate.not_valid_before_utc.timestamp())),
        not_after=Instant(int(certificate.not_valid_after_utc.timestamp())),
    )


def _certificate(der: bytes) -> x509.Certificate:
    """A certificate whose lazily decoded parts have been decoded once, so that nothing raises later."""
    if len(der) > _MAX_CERTIFICATE:
        raise Malformed("snp.certificate_malformed", "a certificate is too large", expected=f"<= {_MAX_CERTIFICATE} bytes")
    try:
        with warnings.catch_warnings():
            # Every AMD VCEK and VLEK has serial number 0, which RFC 5280 forbids and `cryptography` announces to refuse one
            # day; tests/snp holds a certificate with serial 0 so that such a release is noticed before it is taken.
            warnings.simplefilter("ignore", CryptographyDeprecationWarning)
            certificate = x509.load_der_x509_certificate(der)
            _ = (certificate.extensions, certificate.subject, certificate.issuer, certificate.public_key())
            _ = (certificate.not_valid_before_utc, certificate.not_valid_after_utc)
    except Exception as error:  # the library raises ValueError, UnsupportedAlgorithm, DuplicateExtension and others
        raise Malformed("snp.certificate_malformed", "not a certificate", got=type(error).__name__) from None
    return certificate


def _serial(certificate: x509.Certificate) -> int:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CryptographyDeprecationWarning)  # as in _certificate: serial number 0
        return certificate.serial_number


# ---------------------------------------------------------------- 3 and 4: the leaf (57230, 3.1 and table 11)


def _leaf_facts(leaf: x509.Certificate, product: Product) -> SnpLeaf:
    key = leaf.public_key()
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP384R1):
        raise NotAuthentic("snp.leaf_key", "the chip's certificate does not hold a P-384 key")
    hwid, csp_id = _extension(leaf, _HWID), _extension(leaf, _CSP_ID)
    name = _common_name(leaf)
    if hwid is not None and csp_id is None and name == _COMMON_NAME[SigningKey.VCEK]:
        kind = SigningKey.VCEK
    elif csp_id is not None and hwid is None and name == _COMMON_NAME[SigningKey.VLEK]:
        kind = SigningKey.VLEK
    elif hwid is None and csp_id is None:
        raise NotAuthentic("snp.hwid_missing", "the chip's certificate names neither a chip nor a provider")
    else:
        raise NotAuthentic("snp.signer_mismatch", "the certificate is neither a VCEK nor a VLEK", got=name)
    return SnpLeaf(
        key=key,
        kind=kind,
        product=product,
        tcb=_leaf_tcb(leaf, product),
        hwid=None if hwid is None else _hwid(hwid, product),
        csp_id=None if csp_id is None else _ia5(csp_id),
        serial=_serial(leaf),
    )


def _leaf_tcb(leaf: x509.Certificate, product: Product) -> TcbVersion:
    turin = product is Product.TURIN
    if any(_spl(leaf, oid) for oid in _RESERVED_SPL if _extension(leaf, oid) is not None):
        raise Malformed("snp.tcb_reserved", "a reserved component of the certificate's TCB is not zero")
    if not turin and _extension(leaf, _FMC) is not None:
        raise Malformed("snp.tcb_reserved", "the certificate's TCB has an FMC, which this product has not")
    return TcbVersion(
        boot_loader=_spl(leaf, _BOOT_LOADER),
        tee=_spl(leaf, _TEE),
        snp=_spl(leaf, _SNP),
        microcode=_spl(leaf, _MICROCODE),
        fmc=_spl(leaf, _FMC) if turin else None,
    )


def _spl(leaf: x509.Certificate, oid: str) -> int:
    value = _extension(leaf, oid)
    if value is None:
        raise NotAuthentic("snp.tcb_missing", "the chip's certificate lacks a component of its TCB", expected=oid)
    short = len(value) == 3 and value[:2] == b"\x02\x01" and value[2] < 0x80
    long = len(value) == 4 and value[:3] == b"\x02\x02\x00" and value[3] >= 0x80
    if not (short or long):
        raise Malformed("snp.certificate_malformed", "a TCB component is not a DER INTEGER of one byte", got=value)
    return value[-1]


def _hwid(value: bytes, product: Product) -> bytes:
    size = 8 if product is Product.TURIN else 64
    if len(value) == size + 2 and value[:2] == bytes((0x04, size)):  # newer certificates wrap it in an OCTET STRING
        value = value[2:]
    if len(value) != size:
        raise Malformed("snp.certificate_malformed", "hwID has the wrong length", expected=size, got=len(value))
    if not any(value):
        raise NotAuthentic("snp.hwid_missing", "hwID is all zero: it would match a masked chip")
    return value


def _product(leaf: x509.Certificate) -> Product:
    value = _extension(leaf, _PRODUCT_NAME)
    if value is None:
        raise NotAuthentic("snp.product_missing", "the chip's certificate does not name a product")
    line = _ia5(value).partition("-")[0]  # "Milan-B0": line and stepping
    known = {product.value: product for product in Product}
    if line not in known:
        raise NotAuthentic("snp.product_unknown", "no root is known for this product", expected=", ".join(known), got=line)
    return known[line]


def _ia5(value: bytes) -> str:
    if len(value) < 3 or value[0] != 0x16 or value[1] != len(value) - 2 or not value[2:].isascii():
        raise Malformed("snp.certificate_malformed", "not a DER IA5String", got=value)
    return value[2:].decode("ascii")


def _common_name(leaf: x509.Certificate) -> str:
    return "".join(str(attribute.value) for attribute in leaf.subject.get_attributes_for_oid(NameOID.COMMON_NAME))


def _extension(certificate: x509.Certificate, oid: str) -> bytes | None:
    return next(_values(certificate, oid), None)


def _values(certificate: x509.Certificate, oid: str) -> Iterator[bytes]:
    for extension in certificate.extensions:  # the library refuses certificates with an extension twice
        if extension.oid.dotted_string == oid and isinstance(extension.value, x509.UnrecognizedExtension):
            yield extension.value.value


# ---------------------------------------------------------------- 7: revocation


@dataclass(frozen=True, slots=True, kw_only=True)
class _Crl:
    """A CRL as it stands: untrusted."""

    issuer: bytes
    last_update: Instant
    next_update: Instant
    number: int | None
    revoked: frozenset[int]
    pss: bool
    signature: bytes
    signed: bytes


def _crl(crl_der: bytes) -> _Crl:
    try:
        crl = x509.load_der_x509_crl(crl_der)
        last, following = crl.last_update_utc, crl.next_update_utc
        numbers = [one.value.crl_number for one in crl.extensions if isinstance(one.value, x509.CRLNumber)]
        parsed = _Crl(
            issuer=crl.issuer.public_bytes(),
            last_update=Instant(int(last.timestamp())),
            next_update=Instant(0 if following is None else int(following.timestamp())),  # no next update: never current
            number=numbers[0] if numbers else None,
            revoked=frozenset(entry.serial_number for entry in crl),
            pss=crl.signature_algorithm_oid == SignatureAlgorithmOID.RSASSA_PSS,
            signature=crl.signature,
            signed=crl.tbs_certlist_bytes,
        )
    except Exception as error:  # as for certificates: the library has no one class for what does not decode
        raise Malformed("snp.crl_malformed", "not a certificate revocation list", got=type(error).__name__) from None
    return parsed


def _crl_signed_by(crl: _Crl, ark_key: rsa.RSAPublicKey) -> bool:
    try:
        ark_key.verify(crl.signature, crl.signed, _PSS, hashes.SHA384())
    except InvalidSignature:
        return False
    return crl.pss


def _not_revoked(crl_der: bytes, chain: SnpChain, now: Instant) -> None:
    crl = _crl(crl_der)
    if not _crl_signed_by(crl, chain.ark_key):
        raise NotAuthentic("snp.crl_invalid", "the CRL is not signed by the pinned root of this product")
    if crl.issuer != chain.ark_name:
        raise NotAuthentic("snp.crl_invalid", "the CRL is not from the pinned root of this product")
    if now < crl.last_update:
        raise NotAuthentic(
            "snp.crl_not_yet_valid",
            "the CRL is from the future",
            expected=f"<= {rendered(now)}",
            got=rendered(crl.last_update),
            remedy="set the clock",
        )
    if now > crl.next_update:
        raise NotAuthentic(
            "snp.crl_stale",
            "the CRL is out of date",
            expected=f">= {rendered(now)}",
            got=f"next update {rendered(crl.next_update)}",
            remedy="fetch the CRL from AMD again",
        )
    # Leaf serials are 0 in every AMD certificate, so an entry 0 would mean all of them; AMD revokes CAs. Both are judged.
    if chain.ca_serial in crl.revoked or chain.leaf.serial in crl.revoked:
        raise NotAuthentic("snp.revoked", "AMD revoked this certificate")
