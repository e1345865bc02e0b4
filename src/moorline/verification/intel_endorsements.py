"""From a heap of files to `IntelEndorsements`: what each file is, and what belongs to what. Nothing is trusted.

The forms in which Intel's statements travel:

    tcb-info, qe-identity             the service's answer: {"tcbInfo": {...}, "signature": "<hex>"}
    tcb-info-body, qe-identity-body   the signed bytes alone
    tcb-info-raw-json, qe-identity-raw-json   {"raw_tcb_info": "<body>", "signature": [DER bytes], "ca_chain": [PEM]}
    (rust-sgx)
    pcs-response-json                 {"tcb_info_json": "<answer>", "issuer_chain": PEM} and its like (teepot)
    collateral-json                   {"tcb_info": "<body>", "tcb_info_signature": hex, "tcb_info_issuer_chain": PEM ...}
    (dcap-qvl) tcb-eval-numbers-json, crl-json, crl-hex, crl-der, chain-pem

A chain belongs to the statement that its leaf signed; a CRL is the root's or a PCK authority's by the name of its issuer.
Two different statements for the same place are an error: nobody can say which was meant.                    intel.ambiguous
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Sequence
from typing import Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature, encode_dss_signature
from cryptography.x509.oid import NameOID

from moorline.errors import Malformed
from moorline.evidence import intel_collateral as evidence
from moorline.evidence.intel_collateral import SignedDocument
from moorline.verification.intel_collateral import IntelEndorsements
from moorline.verification.intel_pck import pem_certificates

_ECDSA: Final = ec.ECDSA(hashes.SHA256())
_ROOT: Final = "Intel SGX Root CA"
_KINDS: Final = (
    ("tcbInfo", "tcb-info"),
    ("enclaveIdentity", "qe-identity"),
    ("qeIdentity", "qe-identity"),
    ("raw_tcb_info", "tcb-info-raw-json"),
    ("raw_enclave_identity", "qe-identity-raw-json"),
    ("raw_tcb_evaluation_data_numbers", "tcb-eval-numbers-json"),
    ("tcb_info", "collateral-json"),
    ("tcb_info_json", "pcs-response-json"),
    ("enclave_identity_json", "pcs-response-json"),
    ("tcb_evaluation_data_numbers_json", "pcs-response-json"),
    ("crl_data", "pcs-response-json"),
    ("crl_data_base64", "pcs-response-json"),
    ("fmspcs_json", "pcs-response-json"),
    ("crl", "crl-json"),
    ("fmspc", "tcb-info-body"),
    ("miscselect", "qe-identity-body"),
    ("policy_array", "intel-appraisal-policy"),
)


def kind_of_json(data: bytes) -> str | None:
    """Which of Intel's JSON forms `data` is, by its members; None if it is none of them or no strict JSON."""
    try:
        value = evidence.parse_json(data)
    except Malformed:
        return None
    if not isinstance(value, dict):
        return None
    return next((kind for member, kind in _KINDS if member in value), None)


def assemble(files: Sequence[tuple[str, bytes]]) -> IntelEndorsements:
    """The endorsements in `files`, (kind, contents) in any order; kinds that say nothing of a platform are passed over.

    Raises Malformed (`intel.*`) for a file that is not of its kind and for files that contradict one another.
    """
    heap = _Heap()
    for kind, data in files:
        heap.add(kind, data)
    return IntelEndorsements(
        tcb_info=heap.document("tcb_info"),
        qe_identity=heap.document("qe_identity"),
        pck_crl=heap.crls.get("pck"),
        root_crl=heap.crls.get("root"),
    )


class _Heap:
    """Pieces as they come: bodies, the signatures found with them, chains and CRLs."""

    def __init__(self) -> None:
        self.bodies: dict[str, bytes] = {}
        self.signatures: dict[str, bytes] = {}
        self.chains: list[bytes] = []
        self.crls: dict[str, bytes] = {}

    def add(self, kind: str, data: bytes) -> None:
        if kind in ("tcb-info", "qe-identity"):
            self._answer(data)
        elif kind in ("tcb-info-body", "qe-identity-body"):
            self._body(kind.removesuffix("-body").replace("-", "_"), data, None)
        elif kind in ("tcb-info-raw-json", "qe-identity-raw-json"):
            self._raw(data)
        elif kind == "pcs-response-json":
            self._response(data)
        elif kind == "collateral-json":
            self._collateral(data)
        elif kind == "chain-pem":
            self._chain(data)
        elif kind in ("crl-der", "crl-hex", "crl-json"):
            self._crl(_crl_bytes(kind, data))

    def document(self, name: str) -> SignedDocument | None:
        body = self.bodies.get(name)
        if body is None:
            return None
        signature = self.signatures.get(name)
        return SignedDocument(body=body, signature=signature, chain=_chain_of(body, signature, self.chains))

    def _answer(self, data: bytes) -> None:
        document = evidence.signed_document(data, chain=None)
        name = "tcb_info" if kind_of_json(document.body) == "tcb-info-body" else "qe_identity"
        self._body(name, document.body, document.signature)

    def _body(self, name: str, body: bytes, signature: bytes | None) -> None:
        if self.bodies.setdefault(name, body) != body:
            raise Malformed("intel.ambiguous", "two different statements of one kind", got=name)
        if signature is not None and self.signatures.setdefault(name, signature) != signature:
            raise Malformed("intel.ambiguous", "two different signatures of one statement", got=name)

    def _raw(self, data: bytes) -> None:
        members = _members(data)
        name = "tcb_info" if "raw_tcb_info" in members else "qe_identity"
        body = _text(members, "raw_tcb_info" if name == "tcb_info" else "raw_enclave_identity").encode()
        self._body(name, body, _der_signature(members.get("signature")))
        chain = members.get("ca_chain")
        if isinstance(chain, list) and chain and all(isinstance(one, str) for one in chain):
            self._chain("".join(str(one) for one in chain).encode())

    def _response(self, data: bytes) -> None:
        members = _members(data)
        for name in ("tcb_info_json", "enclave_identity_json"):
            if name in members:
                self._answer(_text(members, name).encode())
        if "crl_data" in members:
            self._crl(_pem_crl(_text(members, "crl_data").encode()))
        if "crl_data_base64" in members:
            self._crl(_base64(_text(members, "crl_data_base64")))
        if "issuer_chain" in members:
            self._chain(_text(members, "issuer_chain").encode())

    def _collateral(self, data: bytes) -> None:
        members = _members(data)
        for name in ("tcb_info", "qe_identity"):
            signature = _hex(_text(members, f"{name}_signature"))
            self._body(name, _text(members, name).encode(), signature)
            self._chain(_text(members, f"{name}_issuer_chain").encode())
        for name in ("root_ca_crl", "pck_crl"):
            self._crl(_hex(_text(members, name)))

    def _chain(self, data: bytes) -> None:
        if data not in self.chains:
            self.chains.append(data)

    def _crl(self, data: bytes) -> None:
        place = "root" if _ROOT in _crl_issuer(data) else "pck"
        if self.crls.setdefault(place, data) != data:
            raise Malformed("intel.ambiguous", "two different CRLs of one authority", got=place)


def _chain_of(body: bytes, signature: bytes | None, chains: list[bytes]) -> bytes | None:
    """The chain whose leaf signed `body`; else the first that is no CA's, so that verification can say what is wrong."""
    others: list[bytes] = []
    for chain in chains:
        leaf = _leaf(chain)
        if leaf is None:
            continue
        others.append(chain)
        if signature is not None and len(signature) == 64:
            encoded = encode_dss_signature(int.from_bytes(signature[:32], "big"), int.from_bytes(signature[32:], "big"))
            try:
                leaf.verify(encoded, body, _ECDSA)
            except InvalidSignature:
                continue
            return chain
    return others[0] if others else None


def _leaf(chain: bytes) -> ec.EllipticCurvePublicKey | None:
    """The key of the first certificate, None if it is a CA (the PCK CRL's issuer chain)."""
    try:
        certificate = x509.load_der_x509_certificate(pem_certificates(chain)[0])
        key = certificate.public_key()
        is_ca = certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    except Malformed:
        raise
    except Exception as error:  # the library has no one class for what does not decode
        raise Malformed("intel.chain_malformed", "not a certificate", got=type(error).__name__) from None
    return key if isinstance(key, ec.EllipticCurvePublicKey) and not is_ca else None


def _crl_issuer(data: bytes) -> str:
    try:
        names = x509.load_der_x509_crl(data).issuer.get_attributes_for_oid(NameOID.COMMON_NAME)
        return "".join(str(name.value) for name in names)
    except Exception as error:  # as above
        raise Malformed("intel.crl_malformed", "not a certificate revocation list", got=type(error).__name__) from None


def _crl_bytes(kind: str, data: bytes) -> bytes:
    if kind == "crl-der":
        return data
    if kind == "crl-hex":
        return _hex(data.decode("ascii", "replace").strip())
    return _pem_crl(_text(_members(data), "crl").encode())


def _pem_crl(data: bytes) -> bytes:
    try:
        return x509.load_pem_x509_crl(data).public_bytes(serialization.Encoding.DER)
    except Exception as error:  # as above
        raise Malformed("intel.crl_malformed", "not a certificate revocation list", got=type(error).__name__) from None


def _der_signature(value: object) -> bytes | None:
    """R and s of a DER signature given as a list of bytes; None for an empty list: the statement is unsigned."""
    if not isinstance(value, list) or not all(type(one) is int and 0 <= one <= 255 for one in value):
        raise Malformed("intel.document", "a signature that is no list of bytes", got=type(value).__name__)
    if not value:
        return None
    try:
        r, s = decode_dss_signature(bytes(value))
        return r.to_bytes(32, "big") + s.to_bytes(32, "big")
    except (ValueError, OverflowError):
        raise Malformed("intel.document", "a signature that is no ECDSA signature on P-256") from None


def _members(data: bytes) -> dict[str, object]:
    value = evidence.parse_json(data)
    if not isinstance(value, dict):
        raise Malformed("intel.document", "not a JSON object", got=type(value).__name__)
    return value


def _text(members: dict[str, object], name: str) -> str:
    value = members.get(name)
    if not isinstance(value, str):
        raise Malformed("intel.document", "a member is missing or no string", expected=name, got=type(value).__name__)
    return value


def _hex(text: str) -> bytes:
    try:
        return bytes.fromhex(text)
    except ValueError:
        raise Malformed("intel.document", "not bytes in hex") from None


def _base64(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise Malformed("intel.document", "not base64") from None
