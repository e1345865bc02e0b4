"""Intel's Provisioning Certification Service, version 4 (for SGX and TDX), and the place of its root's CRL.

    GET /{sgx|tdx}/certification/v4/tcb?fmspc=..&update=early|standard              TCB-Info-Issuer-Chain
    GET /{sgx|tdx}/certification/v4/qe/identity?update=early|standard               SGX-Enclave-Identity-Issuer-Chain
    GET /{sgx|tdx}/certification/v4/tcbevaluationdatanumbers                        TCB-Evaluation-Data-Numbers-Issuer-Chain
    GET /sgx/certification/v4/pckcrl?ca=platform|processor&encoding=der             SGX-PCK-CRL-Issuer-Chain
    GET /IntelSGXRootCA.der         at the CRL distribution point that Intel's certificates name; no header

The first two take `tcbEvaluationDataNumber=<number>` instead of `update`, never both.
The header holds the signer's chain, PEM, percent-encoded; without it an answer is worth nothing.
"""

from __future__ import annotations

from typing import Final
from urllib.parse import unquote

from cryptography import x509

from moorline.endorsers.port import Fetched
from moorline.endorsers.transport import Answer, VendorHttp
from moorline.errors import Malformed, Misconfigured
from moorline.evidence.intel_collateral import signed_document
from moorline.verification import collateral_judging as forms
from moorline.verification.collateral import EARLY, STANDARD, ItemKind, ItemName

INTEL_PCS: Final = "https://api.trustedservices.intel.com"
INTEL_CERTIFICATES: Final = "https://certificates.trustedservices.intel.com"
KINDS: Final = (
    ItemKind.INTEL_TCB_INFO,
    ItemKind.INTEL_ENCLAVE_IDENTITY,
    ItemKind.INTEL_EVALUATIONS,
    ItemKind.INTEL_PCK_CRL,
    ItemKind.INTEL_ROOT_CRL,
)
_ROOT_CRL_PATH: Final = "/IntelSGXRootCA.der"
_CHAIN_CAP: Final = 32768
_HEADERS: Final = {
    ItemKind.INTEL_TCB_INFO: "tcb-info-issuer-chain",
    ItemKind.INTEL_ENCLAVE_IDENTITY: "sgx-enclave-identity-issuer-chain",
    ItemKind.INTEL_EVALUATIONS: "tcb-evaluation-data-numbers-issuer-chain",
    ItemKind.INTEL_PCK_CRL: "sgx-pck-crl-issuer-chain",
}
_MEMBERS: Final = {
    ItemKind.INTEL_TCB_INFO: forms.TCB_INFO,
    ItemKind.INTEL_ENCLAVE_IDENTITY: forms.ENCLAVE_IDENTITY,
    ItemKind.INTEL_EVALUATIONS: forms.EVALUATIONS,
}


class IntelPcs:
    """Intel as an endorser: its service, and the server that its root's CRL is on."""

    def __init__(self, http: VendorHttp, certificates: VendorHttp) -> None:
        self._http = http
        self._certificates = certificates

    async def fetch(self, name: ItemName) -> Fetched:
        """As the port says."""
        path, params = request_of(name)
        if name.kind is ItemKind.INTEL_ROOT_CRL:
            answer = await self._certificates.get(path, params)
            _crl(answer)
            return Fetched(name=name, data=answer.body, source=answer.url)
        answer = await self._http.get(path, params)
        chain = _issuer_chain(answer, _HEADERS[name.kind])
        if name.kind is ItemKind.INTEL_PCK_CRL:
            _crl(answer)
            data = forms.packed_crl(answer.body, chain)
        else:
            data = forms.packed(_MEMBERS[name.kind], _statement(answer), chain)
        return Fetched(name=name, data=data, source=answer.url)


def request_of(name: ItemName) -> tuple[str, dict[str, str]]:
    """Path and parameters for an item. Raises Misconfigured("endorser.not_here") for an item that Intel does not have."""
    tee, _, fmspc = name.subject.partition("/")
    if name.kind is ItemKind.INTEL_TCB_INFO:
        return f"/{tee}/certification/v4/tcb", {"fmspc": fmspc, **_track(name.track)}
    if name.kind is ItemKind.INTEL_ENCLAVE_IDENTITY:
        return f"/{tee}/certification/v4/qe/identity", _track(name.track)
    if name.kind is ItemKind.INTEL_EVALUATIONS:
        return f"/{tee}/certification/v4/tcbevaluationdatanumbers", {}
    if name.kind is ItemKind.INTEL_PCK_CRL:
        return "/sgx/certification/v4/pckcrl", {"ca": name.subject, "encoding": "der"}
    if name.kind is ItemKind.INTEL_ROOT_CRL:
        return _ROOT_CRL_PATH, {}
    raise Misconfigured("endorser.not_here", "Intel has no such item", got=name)


def _track(track: str) -> dict[str, str]:
    return {"update": track} if track in (EARLY, STANDARD) else {"tcbEvaluationDataNumber": str(int(track))}


def _issuer_chain(answer: Answer, header: str) -> str:
    value = answer.headers.get(header)
    if value is None:
        raise Malformed(
            "endorser.issuer_chain_missing",
            "the answer lacks its signer's chain",
            expected=header,
            got=answer.url,
            remedy="a proxy or mirror may drop headers: it must pass this one on",
        )
    try:
        chain = unquote(value, errors="strict")
        if len(chain) > _CHAIN_CAP or not chain.isascii() or "-----BEGIN CERTIFICATE-----" not in chain:
            raise ValueError(header)
    except ValueError:
        raise Malformed(
            "endorser.answer_malformed", "the signer's chain is no PEM", expected=header, got=answer.url
        ) from None
    return chain


def _statement(answer: Answer) -> str:
    try:
        signed_document(answer.body, chain=None)
        return answer.body.decode("utf-8")
    except (Malformed, UnicodeDecodeError) as error:
        raise Malformed(
            "endorser.answer_malformed",
            "the answer is no signed statement",
            got=f"{len(answer.body)} bytes from {answer.url}: {error}",
        ) from None


def _crl(answer: Answer) -> None:
    try:
        x509.load_der_x509_crl(answer.body)
    except Exception as error:  # the library raises ValueError, UnsupportedAlgorithm and others
        raise Malformed(
            "endorser.answer_malformed", "the answer is no CRL in DER", got=f"{answer.url}: {type(error).__name__}"
        ) from None
