"""MACs of CMP messages under a shared secret: PasswordBasedMac (RFC 4210 5.1.3.1), PBMAC1 (RFC 9481 6.1.2). Pure.

Their parameters come with a message and are untrusted: what is weak, unknown or would take long is refused before anything
is computed. Our secrets are one-time codes of 128 random bits, so iterations protect nothing here and are only bounded.
"""

from __future__ import annotations

import hashlib
import hmac
from dataclasses import dataclass
from typing import Final

from moorline.errors import Refused
from moorline.wire.cmp_elements import Algorithm, algorithm_of, children, integer_of, malformed, single
from moorline.wire.der import INTEGER, OCTET_STRING, SEQUENCE

PBM: Final = "1.2.840.113533.7.66.13"
PBMAC1: Final = "1.2.840.113549.1.5.14"
ALGORITHMS: Final = frozenset({PBM, PBMAC1})
_PBKDF2: Final = "1.2.840.113549.1.5.12"
_OWF: Final = {"2.16.840.1.101.3.4.2.1": "sha256", "2.16.840.1.101.3.4.2.3": "sha512"}
_HMAC_SHA1: Final = {"1.3.6.1.5.5.8.1.2": "sha1", "1.2.840.113549.2.7": "sha1"}
_HMAC_SHA2: Final = {"1.2.840.113549.2.9": "sha256", "1.2.840.113549.2.10": "sha384", "1.2.840.113549.2.11": "sha512"}
_MACS: Final = _HMAC_SHA1 | {"1.2.840.113549.2.9": "sha256"}
_ITERATIONS: Final = range(100, 100_001)
_SALT_CAP: Final = 128
_KEY_LENGTHS: Final = range(16, 65)


def mac(algorithm: Algorithm, secret: str, data: bytes) -> bytes:
    """The MAC over `data`. Raises Refused("cmp.algorithm") for weak or unknown choices, Malformed("cmp.malformed")."""
    if algorithm.oid == PBM:
        return _password_based(algorithm, secret, data)
    if algorithm.oid == PBMAC1:
        return _pbmac1(algorithm, secret, data)
    raise _refused(algorithm.oid)


def _password_based(algorithm: Algorithm, secret: str, data: bytes) -> bytes:
    """K = OWF iterated over secret | salt. HMAC-SHA-1 is taken: OpenSSL 3.0 sends nothing else by default."""
    salt, owf, iterations, chosen = _pbm_parameters(algorithm.parameters)
    if owf not in _OWF or chosen not in _MACS or iterations not in _ITERATIONS or len(salt) > _SALT_CAP:
        raise _refused(f"{owf}, {iterations}, {chosen}")
    key = secret.encode("ascii") + salt
    for _ in range(iterations):
        key = hashlib.new(_OWF[owf], key).digest()
    return hmac.digest(key, data, _MACS[chosen])


def _pbmac1(algorithm: Algorithm, secret: str, data: bytes) -> bytes:
    """PBKDF2 with HMAC and SHA-2, then HMAC with SHA-2 (RFC 8018 7.1). Without keyLength the MAC's own size is taken."""
    found = _pbmac1_parameters(algorithm.parameters)
    fits = (
        found.derivation == _PBKDF2
        and found.prf in _HMAC_SHA2
        and found.scheme in _HMAC_SHA2
        and found.iterations in _ITERATIONS
        and len(found.salt) <= _SALT_CAP
        and (found.key_length is None or found.key_length in _KEY_LENGTHS)
    )
    if not fits:
        raise _refused(f"{found.prf}, {found.iterations}, {found.scheme}")
    chosen = _HMAC_SHA2[found.scheme]
    length = found.key_length or hashlib.new(chosen).digest_size
    key = hashlib.pbkdf2_hmac(_HMAC_SHA2[found.prf], secret.encode("ascii"), found.salt, found.iterations, length)
    return hmac.digest(key, data, chosen)


def _refused(got: str) -> Refused:
    return Refused(
        "cmp.algorithm",
        "this MAC under a password is not taken",
        expected=f"PBMAC1 or PasswordBasedMac with SHA-2, {_ITERATIONS.start} to {_ITERATIONS.stop - 1} times",
        got=got,
    )


def _pbm_parameters(data: bytes) -> tuple[bytes, str, int, str]:
    """salt, one-way function, iteration count and MAC of PBMParameter (RFC 4210 5.1.3.1). Raises only Malformed."""
    parts = children(single(data, SEQUENCE).content)
    if len(parts) != 4 or parts[0].tag != OCTET_STRING:
        raise malformed("PBMParameter")
    return parts[0].content, algorithm_of(parts[1]).oid, integer_of(parts[2]), algorithm_of(parts[3]).oid


@dataclass(frozen=True, slots=True, kw_only=True)
class _Pbmac1:
    """PBMAC1-params (RFC 8018 A.5) with PBKDF2-params: OIDs, salt, iterations; `key_length` None: left out."""

    derivation: str
    salt: bytes
    iterations: int
    key_length: int | None
    prf: str
    scheme: str


def _pbmac1_parameters(data: bytes) -> _Pbmac1:
    """What PBMAC1 is to be computed with. Raises only Malformed."""
    parts = children(single(data, SEQUENCE).content)
    if len(parts) != 2:
        raise malformed("PBMAC1 parameters")
    derivation = algorithm_of(parts[0])
    inner = children(single(derivation.parameters, SEQUENCE).content)
    if len(inner) < 2 or inner[0].tag != OCTET_STRING:
        raise malformed("PBKDF2 parameters")
    rest = inner[2:]
    length = integer_of(rest.pop(0)) if rest and rest[0].tag == INTEGER else None
    prf = algorithm_of(rest.pop(0)).oid if rest else "1.2.840.113549.2.7"  # DEFAULT hmacWithSHA1
    if rest:
        raise malformed("PBKDF2 parameters with more than there are")
    return _Pbmac1(
        derivation=derivation.oid,
        salt=inner[0].content,
        iterations=integer_of(inner[1]),
        key_length=length,
        prf=prf,
        scheme=algorithm_of(parts[1]).oid,
    )
