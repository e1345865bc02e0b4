"""Who an end of a TLS connection is, and OpenSSL's settings, which are the same everywhere here.

- TLS 1.3 only, AES-256-GCM or ChaCha20; OpenSSL's default groups, of which X25519MLKEM768 comes first;
- no resumption (no session cache, no tickets taken back, none offered) and no 0-RTT;
- keys and certificates live in memory, never in a file;
- OpenSSL's own judgement of the peer's chain is switched off, because it knows neither our roots nor our time: the caller's
  `Verify` judges the certificates after the handshake and before a byte of the application is read or written.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from OpenSSL import SSL

from moorline.errors import Misconfigured
from moorline.wire.certificates import parse_certificate
from moorline.wire.keys import PrivateKey

_CIPHERS: Final = b"TLS_AES_256_GCM_SHA384:TLS_CHACHA20_POLY1305_SHA256"

Verify = Callable[[tuple[bytes, ...]], None]
"""Judges the peer's certificates (DER, as sent, leaf first); raises MoorlineError to refuse."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TlsIdentity:
    """A key and its certificates, DER, leaf first; the root may be left out."""

    key: PrivateKey
    chain: tuple[bytes, ...]


def settings(identity: TlsIdentity | None) -> SSL.Context:
    """OpenSSL's settings for this identity, none of the peer's certificates asked for.

    Raises Misconfigured("tls.key_unsupported" | "tls.identity").
    """
    context = SSL.Context(SSL.TLS_METHOD)
    context.set_min_proto_version(SSL.TLS1_3_VERSION)
    context.set_max_proto_version(SSL.TLS1_3_VERSION)
    context.set_tls13_ciphersuites(_CIPHERS)
    context.set_options(SSL.OP_NO_TICKET | SSL.OP_NO_COMPRESSION | SSL.OP_NO_RENEGOTIATION)
    context.set_session_cache_mode(SSL.SESS_CACHE_OFF)
    context.set_mode(SSL.MODE_RELEASE_BUFFERS)  # a session that is silent holds no 34 KiB of buffers
    if identity is not None:
        _show(context, identity)
    return context


def of_client(identity: TlsIdentity | None) -> SSL.Context:
    """Settings of who connects: the server's certificates are for its `Verify`."""
    context = settings(identity)
    context.set_verify(SSL.VERIFY_PEER, _judged_later)
    return context


def of_server(identity: TlsIdentity, *, mutual: bool) -> SSL.Context:
    """Settings of who listens; `mutual`: a client that shows no certificate fails in the handshake."""
    context = settings(identity)
    if mutual:
        context.set_verify(SSL.VERIFY_PEER | SSL.VERIFY_FAIL_IF_NO_PEER_CERT, _judged_later)
    else:
        context.set_verify(SSL.VERIFY_NONE)
    return context


def _show(context: SSL.Context, identity: TlsIdentity) -> None:
    leaf, *others = (parse_certificate(der) for der in identity.chain)
    _require_usual(identity.key)
    context.use_certificate(leaf)
    for certificate in others:
        context.add_extra_chain_cert(certificate)
    try:
        context.use_privatekey(identity.key)
        context.check_privatekey()
    except SSL.Error:
        raise Misconfigured("tls.identity", "the private key is not the one of the certificate") from None


def _require_usual(key: object) -> None:
    """An experimental key (ML-DSA-65) opens no connection here: no peer of ours would take its certificate."""
    if not isinstance(key, ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey | rsa.RSAPrivateKey):
        raise Misconfigured(
            "tls.key_unsupported",
            "no TLS is spoken with a key of this kind",
            expected="P-256, P-384, Ed25519 or RSA",
            got=type(key).__name__,
            remedy="use a key of another kind (rekey with kind p-256)",
        )


def _judged_later(_connection: SSL.Connection, _certificate: object, _error: int, _depth: int, _ok: int) -> bool:
    # Not "accept anything": `stream.established` runs the caller's `Verify` before the stream is handed out.
    return True
