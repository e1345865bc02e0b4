"""AMD's Key Distribution Service (AMD 57230, "Versioned Chip Endorsement Key (VCEK) Certificate and KDS Interface").

    GET /vcek/v1/{product}/{hwID}?blSPL=..&teeSPL=..&snpSPL=..&ucodeSPL=..   the VCEK, DER; from Turin on also fmcSPL, and
                                                                             hwID is eight bytes instead of 64
    GET /{vcek|vlek}/v1/{product}/cert_chain                                 ASK or ASVK, then ARK, PEM
    GET /{vcek|vlek}/v1/{product}/crl                                        the CRL, DER

`product` is the product line: Milan, Genoa (also Bergamo and Siena), Turin. hwID is in lower-case hex, SPLs in decimal. A
VLEK is given out to cloud providers only, against a secret of theirs, and comes with the evidence.
"""

from __future__ import annotations

from typing import Final

from cryptography import x509

from moorline.endorsers.port import Fetched
from moorline.endorsers.transport import Answer, VendorHttp
from moorline.errors import Malformed, Misconfigured
from moorline.evidence.snp import Product, TcbVersion
from moorline.verification.collateral import ItemKind, ItemName

AMD_KDS: Final = "https://kdsintf.amd.com"
KINDS: Final = (ItemKind.SNP_VCEK, ItemKind.SNP_CHAIN, ItemKind.SNP_CRL)
_CERTIFICATE: Final = b"-----BEGIN CERTIFICATE-----"


class AmdKds:
    """AMD as an endorser."""

    def __init__(self, http: VendorHttp) -> None:
        self._http = http

    async def fetch(self, name: ItemName) -> Fetched:
        """As the port says. What is asked for is the item's name; that the answer is that item is judged later."""
        path, params = request_of(name)
        answer = await self._http.get(path, params)
        if name.kind is ItemKind.SNP_CHAIN:
            _demand(answer, answer.body.count(_CERTIFICATE) == 2, "a chain of two certificates in PEM")
        else:
            _demand(answer, _decodes(name.kind, answer.body), "a certificate or CRL in DER")
        return Fetched(name=name, data=answer.body, source=answer.url)


def request_of(name: ItemName) -> tuple[str, dict[str, str]]:
    """Path and parameters for an item. Raises Misconfigured("endorser.not_here") for an item that AMD does not have."""
    if name.kind is ItemKind.SNP_VCEK:
        line, hwid, raw = name.subject.split("/")
        return f"/vcek/v1/{line}/{hwid}", _levels(TcbVersion.parse(int(raw, 16), Product(line)))
    if name.kind in KINDS:
        line, key = name.subject.split("/")
        return f"/{key}/v1/{line}/{'cert_chain' if name.kind is ItemKind.SNP_CHAIN else 'crl'}", {}
    raise Misconfigured("endorser.not_here", "AMD has no such item", got=name)


def _levels(tcb: TcbVersion) -> dict[str, str]:
    levels = {"blSPL": tcb.boot_loader, "teeSPL": tcb.tee, "snpSPL": tcb.snp, "ucodeSPL": tcb.microcode}
    if tcb.fmc is not None:
        levels = {"fmcSPL": tcb.fmc, **levels}
    return {name: f"{level:02d}" for name, level in levels.items()}


def _decodes(kind: ItemKind, body: bytes) -> bool:
    try:
        if kind is ItemKind.SNP_CRL:
            x509.load_der_x509_crl(body)
        else:
            x509.load_der_x509_certificate(body)
    except Exception:  # the library raises ValueError, UnsupportedAlgorithm and others
        return False
    return True


def _demand(answer: Answer, fits: bool, expected: str) -> None:  # noqa: FBT001 - the one thing that is asked
    if not fits:
        raise Malformed(
            "endorser.answer_malformed",
            "the vendor's answer is not the item",
            expected=expected,
            got=f"{len(answer.body)} bytes from {answer.url}",
        )
