"""Certificate chains of the consortium: leaf -> { HSM | issuing CA } -> provider -> authority -> root (PROTOCOLS.md 2).

OpenSSL judges the path (`cryptography.x509.verification` cannot process URI name constraints), and rules of ours stand
on top of it. In order:

1. every certificate decodes, none is too large, and there are at most eight besides the roots;
2. OpenSSL finds a path to one of `roots` at time `now`, in strict mode (RFC 5280 key usage, path length, critical name
   constraints, key identifiers);
3. the leaf is a leaf: not a CA, may sign, usable as TLS client and as TLS server;
4. the leaf has exactly one SPIFFE ID;
5. one provider's certificate stands in the path, and its one permitted URI is the leaf's trust domain, character for
   character. Only an authority's own `authority/...` identity stands directly below an authority.

A chain is necessary and never sufficient: it establishes nothing about revocation, nor about the standing of provider, HSM
or issuing CA on the ledger.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID, SignatureAlgorithmOID
from OpenSSL import crypto

from moorline.clock import Instant, to_datetime
from moorline.errors import Malformed, NotAuthentic
from moorline.nfv import Role, SpiffeId, parse_name
from moorline.wire.certificates import SERIAL_END, parse_certificate, spiffe_id_of

MAX_INTERMEDIATES: Final = 8
_ALGORITHMS: Final = frozenset(
    {
        SignatureAlgorithmOID.ECDSA_WITH_SHA256,
        SignatureAlgorithmOID.ECDSA_WITH_SHA384,
        SignatureAlgorithmOID.ECDSA_WITH_SHA512,
        SignatureAlgorithmOID.ED25519,
        SignatureAlgorithmOID.RSA_WITH_SHA256,
        SignatureAlgorithmOID.RSA_WITH_SHA384,
        SignatureAlgorithmOID.RSA_WITH_SHA512,
        SignatureAlgorithmOID.RSASSA_PSS,
    }
)
_FROM_VERIFY_CHAIN: Final = object()


class VerifiedChain:
    """A leaf whose path to a consortium root held at one time. Made by `verify_chain` alone.

    `path` is DER, leaf first, root last. It does not establish that anybody in the path is still in good standing.
    """

    __slots__ = ("leaf", "path", "provider", "spiffe_id")

    def __init__(
        self,
        *,
        proof: object,
        leaf: x509.Certificate,
        path: tuple[bytes, ...],
        spiffe_id: SpiffeId,
        provider: bytes | None,
    ) -> None:
        if proof is not _FROM_VERIFY_CHAIN:
            message = "a VerifiedChain comes from verify_chain only"
            raise TypeError(message)
        self.leaf = leaf
        self.path = path
        self.spiffe_id = spiffe_id
        self.provider = provider

    @property
    def leaf_der(self) -> bytes:
        """The leaf."""
        return self.path[0]

    @property
    def issuer(self) -> bytes:
        """The CA that signed the leaf: an HSM, an issuing CA, or (authority identities only) an authority."""
        return self.path[1]

    @property
    def root(self) -> bytes:
        """The consortium root the path ends at."""
        return self.path[-1]

    @property
    def issuer_name(self) -> str:
        """The issuer's own name (common name); on the ledger, the id of an HSM or issuing CA of the provider."""
        return _common_name(self.path[1])

    @property
    def provider_name(self) -> str:
        """The provider's own name. Raises NotAuthentic("chain.no_provider") for an authority's identity."""
        if self.provider is None:
            raise NotAuthentic("chain.no_provider", "an authority's identity belongs to no provider")
        return _common_name(self.provider)

    @property
    def leaf_digest(self) -> bytes:
        """SHA-256 of the leaf; 32 bytes."""
        return hashlib.sha256(self.path[0]).digest()

    @property
    def serial(self) -> int:
        """The leaf's serial number."""
        return self.leaf.serial_number


def verify_chain(leaf_der: bytes, intermediates: Sequence[bytes], roots: Sequence[bytes], now: Instant) -> VerifiedChain:
    """The chain of an X509-SVID, by the five rules above. All input is untrusted except `roots` and `now`.

    Raises Malformed (`certificate.*`) and NotAuthentic (`chain.*`). No roots accept nothing.
    """
    leaf = parse_certificate(leaf_der)
    path = _path(leaf, intermediates, roots, now)
    _leaf_usage(leaf)
    _leaf_key(leaf)
    try:
        spiffe_id = spiffe_id_of(leaf)
    except Malformed as error:
        raise NotAuthentic("chain.spiffe_id", "the leaf does not carry exactly one SPIFFE ID", got=error.says) from None
    provider = _provider_of(path, spiffe_id)
    return VerifiedChain(proof=_FROM_VERIFY_CHAIN, leaf=leaf, path=path, spiffe_id=spiffe_id, provider=provider)


def verify_ca(
    certificate_der: bytes, intermediates: Sequence[bytes], roots: Sequence[bytes], now: Instant
) -> tuple[bytes, ...]:
    """The path (DER, that certificate first, root last) of a CA: an HSM's, an issuing CA's, a provider's.

    Rules 1 and 2, and that it is a CA which may sign certificates. Raises as `verify_chain`.
    """
    certificate = parse_certificate(certificate_der)
    path = _path(certificate, intermediates, roots, now)
    if not _is_ca(certificate):
        raise NotAuthentic("chain.not_ca", "the certificate is not one of a CA", expected="CA:TRUE, keyCertSign")
    return path


def permitted_trust_domain(certificate: x509.Certificate) -> str | None:
    """The one trust domain a provider's certificate is critically constrained to; None if it is not a provider's."""
    try:
        extension = certificate.extensions.get_extension_for_class(x509.NameConstraints)
    except x509.ExtensionNotFound:
        return None
    permitted = extension.value.permitted_subtrees or []
    uris = [name.value for name in permitted if isinstance(name, x509.UniformResourceIdentifier)]
    return uris[0] if extension.critical and len(uris) == 1 else None


def _leaf_key(leaf: x509.Certificate) -> None:
    """Keys of experimental kinds (ML-DSA-65) are certified here for others; no end of ours speaks TLS with them."""
    kind = leaf.public_key()
    if not isinstance(kind, ec.EllipticCurvePublicKey | ed25519.Ed25519PublicKey | rsa.RSAPublicKey):
        raise NotAuthentic(
            "chain.key_unsupported",
            "the leaf's key is of a kind that no end here takes",
            expected="P-256, P-384, Ed25519 or RSA",
            got=type(kind).__name__,
            remedy="use a key of another kind (rekey with kind p-256)",
        )


def _common_name(der: bytes) -> str:
    names = parse_certificate(der).subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    text = names[0].value if len(names) == 1 else ""
    if not isinstance(text, str):
        raise Malformed("name.malformed", "a CA's common name is not text")
    return parse_name(text, "name of a CA")


def _path(
    first: x509.Certificate, intermediates: Sequence[bytes], roots: Sequence[bytes], now: Instant
) -> tuple[bytes, ...]:
    if len(intermediates) > MAX_INTERMEDIATES:
        raise NotAuthentic(
            "chain.too_long", "too many certificates", expected=f"<= {MAX_INTERMEDIATES}", got=len(intermediates)
        )
    if not roots:
        raise NotAuthentic("chain.untrusted", "no consortium root is known here, so no chain can end at one")
    try:
        store = crypto.X509Store()
        for root in roots:
            store.add_cert(_native(root))
        store.set_time(to_datetime(now))
        store.set_flags(crypto.X509StoreFlags.X509_STRICT)
        context = crypto.X509StoreContext(
            store, crypto.X509.from_cryptography(first), [_native(der) for der in intermediates]
        )
        found = context.get_verified_chain()
    except crypto.X509StoreContextError as error:
        raise _refusal(error) from None
    except crypto.Error as error:
        # OpenSSL's own decoder is a second opinion on bytes that `parse_certificate` took.
        raise Malformed("certificate.undecodable", "the bytes are not a certificate", got=str(error)) from None
    path = [certificate.to_cryptography() for certificate in found]
    for one in path:
        _sound(one)
    return tuple(one.public_bytes(Encoding.DER) for one in path)


def _sound(certificate: x509.Certificate) -> None:
    """What OpenSSL lets pass at its default level: weak digests, and serial numbers outside RFC 5280 4.1.2.2."""
    algorithm = certificate.signature_algorithm_oid
    if algorithm not in _ALGORITHMS:
        raise NotAuthentic(
            "chain.algorithm",
            "a certificate of the chain is signed by an algorithm that does not count here",
            expected="ECDSA, Ed25519 or RSA, with SHA-256 or longer",
            got=algorithm.dotted_string,
        )
    if not 0 < certificate.serial_number < SERIAL_END:
        raise NotAuthentic(
            "chain.serial",
            "a serial number is positive and has 20 octets at most (RFC 5280 4.1.2.2)",
            got=certificate.serial_number,
        )


@lru_cache(maxsize=256)  # CA certificates come again with every peer; a leaf never stands here
def _native(der: bytes) -> crypto.X509:
    return crypto.X509.from_cryptography(parse_certificate(der))


def _refusal(error: crypto.X509StoreContextError) -> NotAuthentic:
    number, depth, text = error.errors[0], error.errors[1], str(error.errors[2])
    made = _BY_NUMBER.get(number, _strict)
    return made(f"{text} at depth {depth} (OpenSSL {number})")


def _untrusted(got: str) -> NotAuthentic:
    return NotAuthentic("chain.untrusted", "no path leads from the certificate to a consortium root", got=got)


def _expired(got: str) -> NotAuthentic:
    return NotAuthentic("chain.expired", "a certificate of the chain has expired", got=got, remedy="renew it")


def _not_yet(got: str) -> NotAuthentic:
    return NotAuthentic("chain.not_yet_valid", "a certificate of the chain is not valid yet", got=got)


def _name_constraint(got: str) -> NotAuthentic:
    return NotAuthentic("chain.name_constraint", "a name lies outside what its provider may certify", got=got)


def _path_length(got: str) -> NotAuthentic:
    return NotAuthentic("chain.path_length", "more CAs stand below one than it permits", got=got)


def _not_ca(got: str) -> NotAuthentic:
    return NotAuthentic("chain.not_ca", "a certificate was signed by one that is not a CA", got=got)


def _signature(got: str) -> NotAuthentic:
    return NotAuthentic("chain.signature", "a signature in the chain does not verify", got=got)


def _strict(got: str) -> NotAuthentic:
    return NotAuthentic("chain.strict", "the chain breaks a rule of RFC 5280", got=got)


# X509_V_ERR_* of OpenSSL's include/openssl/x509_vfy.h; whatever is not listed is a breach of RFC 5280 all the same.
_BY_NUMBER: Final[dict[int, Callable[[str], NotAuthentic]]] = {
    2: _untrusted,
    18: _untrusted,
    19: _untrusted,
    20: _untrusted,
    21: _untrusted,
    27: _untrusted,
    7: _signature,
    4: _signature,
    9: _not_yet,
    10: _expired,
    24: _not_ca,
    25: _path_length,
    32: _not_ca,
    79: _not_ca,
    47: _name_constraint,
    48: _name_constraint,
    49: _name_constraint,
    51: _name_constraint,
    52: _name_constraint,
    53: _name_constraint,
}


def _leaf_usage(leaf: x509.Certificate) -> None:
    try:
        constraints = leaf.extensions.get_extension_for_class(x509.BasicConstraints).value
        usage = leaf.extensions.get_extension_for_class(x509.KeyUsage).value
        purposes = set(leaf.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value)
    except x509.ExtensionNotFound as error:
        raise NotAuthentic(
            "chain.usage",
            "the leaf does not say what it is for",
            expected="basicConstraints, keyUsage, extKeyUsage",
            got=f"{error.oid.dotted_string} absent",
        ) from None
    wanted = {ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH}
    if constraints.ca or usage.key_cert_sign or not usage.digital_signature or not wanted <= purposes:
        raise NotAuthentic(
            "chain.usage",
            "the certificate is not one of a TLS client and server",
            expected="CA:FALSE, digitalSignature, clientAuth, serverAuth",
            got=f"CA:{constraints.ca}, {sorted(oid.dotted_string for oid in purposes)}",
        )


def _is_ca(certificate: x509.Certificate) -> bool:
    try:
        constraints = certificate.extensions.get_extension_for_class(x509.BasicConstraints).value
        usage = certificate.extensions.get_extension_for_class(x509.KeyUsage).value
    except x509.ExtensionNotFound:
        return False
    return constraints.ca and usage.key_cert_sign


@lru_cache(maxsize=256)  # as `_native`
def _permitted(der: bytes) -> str | None:
    return permitted_trust_domain(parse_certificate(der))


def _provider_of(path: tuple[bytes, ...], spiffe_id: SpiffeId) -> bytes | None:
    above = [(der, _permitted(der)) for der in path[1:]]
    providers = [(der, domain) for der, domain in above if domain is not None]
    if spiffe_id.role is Role.AUTHORITY and not providers:
        return None
    if len(providers) != 1 or spiffe_id.role is Role.AUTHORITY:
        raise NotAuthentic(
            "chain.no_provider",
            "the path does not lead through exactly one provider",
            expected="leaf, HSM or issuing CA, provider, authority, root",
            got=f"{len(providers)} provider certificates above {spiffe_id}",
        )
    der, domain = providers[0]
    if domain != spiffe_id.trust_domain:
        raise NotAuthentic(
            "chain.trust_domain",
            "the leaf's trust domain is not its provider's",
            expected=domain,
            got=spiffe_id.trust_domain,
        )
    return der
