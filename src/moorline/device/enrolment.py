"""Enrolment over EST (RFC 7030): cacerts, simpleenroll with a one-time code, simplereenroll with the current certificate.

1. the server is checked by chain to the consortium root and by its DNS name (wire.http); nothing else is known about it yet
2. cacerts brings the CAs of the provider; each must lead to the root
3. simpleenroll sends a CSR signed by the device's key, with the one-time code as HTTP Basic password (RFC 7030 3.2.3)
4. the certificate that comes back must be for this key, this device, and lead to the consortium root; only then it is kept

Linking the request to its TLS connection by tls-unique does not exist in TLS 1.3 and is not offered (PROTOCOLS.md 7); a code
is bound to the first key it is used with, so the same request can be repeated and another one cannot take its place.
"""

from __future__ import annotations

import base64
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import pkcs7

from moorline.channel.tls import TlsIdentity
from moorline.clock import Instant
from moorline.device import cmp
from moorline.device.store import DeviceStore
from moorline.errors import Malformed, NotAuthentic
from moorline.ledger.client import Endpoint
from moorline.ledger.light_client import LedgerTrust
from moorline.nfv import Role, parse_name
from moorline.verification.chains import VerifiedChain, verify_ca, verify_chain
from moorline.wire.http import ClientIdentity, HttpClient

EST: Final = "/.well-known/est"
_CSR_HEADERS: Final = {"content-type": "application/pkcs10", "content-transfer-encoding": "base64"}
_MAX_CERTIFICATES: Final = 9


async def enrol(store: DeviceStore, *, url: str, server_name: str, device: str, code: str, now: Instant) -> VerifiedChain:
    """The device's first certificate, verified and kept. The store must be provisioned.

    Raises `peer.*`, what the server reports (a used or wrong code), Malformed("est.*"), NotAuthentic("est.other_identity").
    """
    trust = store.trust()
    key = store.key()
    basic = base64.b64encode(f"{parse_name(device, 'device')}:{code}".encode()).decode()
    async with HttpClient(url, server_name=server_name, roots_pem=roots_pem(trust)) as client:
        issuers = await _cacerts(client, trust, now)
        headers = {**_CSR_HEADERS, "authorization": f"Basic {basic}"}
        answer = await client.send("POST", f"{EST}/simpleenroll", content=_request(key, device), headers=headers)
    store.keep_home(Endpoint(url=url, server_name=server_name))
    return _kept(store, trust, key, device, certificates_of(answer), issuers, now)


async def renew(store: DeviceStore, *, url: str, server_name: str, now: Instant) -> VerifiedChain:
    """A fresh certificate for the same key and name, on the strength of the current one.

    EST (RFC 7030 4.2.2), where the key serves TLS; a key in a token or TPM signs a CMP message instead (`certified`).
    """
    if store.held_elsewhere:
        store.keep_home(Endpoint(url=url, server_name=server_name))
        chain = await certified(store, store.key(), now)
        store.keep_chain(chain.path[:-1])
        return chain
    trust = store.trust()
    identity = store.identity()
    key = store.key()
    device = verify_chain(identity.chain[0], identity.chain[1:], trust.roots, now).spiffe_id.segments[0]
    shown = client_identity(identity)
    async with HttpClient(url, server_name=server_name, roots_pem=roots_pem(trust), identity=shown) as client:
        issuers = await _cacerts(client, trust, now)
        answer = await client.send(
            "POST", f"{EST}/simplereenroll", content=_request(key, device), headers=dict(_CSR_HEADERS)
        )
    return _kept(store, trust, key, device, certificates_of(answer), issuers, now)


async def certified(store: DeviceStore, key: ec.EllipticCurvePrivateKey, now: Instant) -> VerifiedChain:
    """A certificate in this device's name for a key, at home, asked for in a message that the device's own key signs (CMP).

    Verified, and not kept. Raises `cmp.*`, `chain.*`, `peer.*`, NotAuthentic("est.other_identity").
    """
    trust, home, chain = store.trust(), store.home(), store.chain()
    device = verify_chain(chain[0], chain[1:], trust.roots, now).spiffe_id.segments[0]
    async with HttpClient(home.url, server_name=home.server_name, roots_pem=roots_pem(trust)) as client:
        csr = cmp.pkcs10(key, device)
        found = await cmp.certified(client, store.key(), chain, csr, roots=trust.roots, now=now)
    return _verified(trust, key, device, found, (), now)


def client_identity(identity: TlsIdentity) -> ClientIdentity:
    """Certificate chain and key of the device as an HTTPS client wants them; in memory only."""
    encoding, form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    pem = identity.key.private_bytes(encoding, form, serialization.NoEncryption())
    return ClientIdentity(certificate_chain_pem=_pem(identity.chain), private_key_pem=pem)


def certificates_of(body: bytes) -> tuple[bytes, ...]:
    """The certificates (DER) of a base64 certs-only CMS message (RFC 7030 4.1.3). Raises only Malformed("est.answer").

    Untrusted: the order says nothing, and nobody signed the set.
    """
    try:
        cms = base64.b64decode(b"".join(body.split()), validate=True)
        found = pkcs7.load_der_pkcs7_certificates(cms)
    except Exception as error:  # the CMS parser raises several kinds on odd bytes
        raise Malformed("est.answer", "the server's answer is not certs-only CMS", got=type(error).__name__) from None
    if not 0 < len(found) <= _MAX_CERTIFICATES:
        raise Malformed(
            "est.answer", "the server's answer has too many or no certificates", expected=_MAX_CERTIFICATES, got=len(found)
        )
    return tuple(certificate.public_bytes(serialization.Encoding.DER) for certificate in found)


def roots_pem(trust: LedgerTrust) -> bytes:
    """The consortium's roots, for an HTTPS client."""
    return _pem(trust.roots)


async def _cacerts(client: HttpClient, trust: LedgerTrust, now: Instant) -> tuple[bytes, ...]:
    """The provider's CAs, each of which leads to a root that was provisioned; a root in the answer is left out."""
    found = certificates_of(await client.send("GET", f"{EST}/cacerts", headers={}))
    issuers = tuple(der for der in found if der not in trust.roots)
    for der in issuers:
        verify_ca(der, issuers, trust.roots, now)
    return issuers


def _request(key: ec.EllipticCurvePrivateKey, device: str) -> bytes:
    return base64.b64encode(cmp.pkcs10(key, device))


def _kept(
    store: DeviceStore,
    trust: LedgerTrust,
    key: ec.EllipticCurvePrivateKey,
    device: str,
    found: tuple[bytes, ...],
    issuers: tuple[bytes, ...],
    now: Instant,
) -> VerifiedChain:
    chain = _verified(trust, key, device, found, issuers, now)
    store.keep_chain(chain.path[:-1])
    return chain


def _verified(
    trust: LedgerTrust,
    key: ec.EllipticCurvePrivateKey,
    device: str,
    found: tuple[bytes, ...],
    issuers: tuple[bytes, ...],
    now: Instant,
) -> VerifiedChain:
    """4. Raises NotAuthentic("est.other_identity"), `chain.*`."""
    form = serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    mine = key.public_key().public_bytes(*form)
    leaves = [der for der in found if x509.load_der_x509_certificate(der).public_key().public_bytes(*form) == mine]
    if len(leaves) != 1:
        raise NotAuthentic("est.other_identity", "the server certified another key than this device's")
    others = tuple(dict.fromkeys(der for der in (*found, *issuers) if der not in (*leaves, *trust.roots)))
    chain = verify_chain(leaves[0], others, trust.roots, now)
    if chain.spiffe_id.role is not Role.DEVICE or chain.spiffe_id.segments != (device,):
        raise NotAuthentic(
            "est.other_identity", "the server certified another name", expected=device, got=str(chain.spiffe_id)
        )
    return chain


def _pem(chain: tuple[bytes, ...]) -> bytes:
    certificates = (x509.load_der_x509_certificate(der) for der in chain)
    return b"".join(certificate.public_bytes(serialization.Encoding.PEM) for certificate in certificates)
