"""Arm CCA evidence: the token of a Realm, its platform token and its realm token. No trust, no crypto.

Formats: the Arm CCA attestation token (RMM specification A7.2; draft-ffm-rats-cca-token), a collection under CBOR tag 399
(both tokens as byte strings) or tag 907 (each token in a CMW record of type 263, EAT). Two generations of claims are in use:

* platform profile `http://arm.com/CCA-SSD/1.0.0` (legacy) or `tag:arm.com,2023:cca_platform#1.0.0`;
* a realm token without profile has its key as an uncompressed P-384 point, one with a profile has it as a COSE_Key.

What makes a token well-formed here: preferred, definite CBOR; exactly the two tokens, each a tagged COSE_Sign1 with its
algorithm in the protected header; every mandatory claim, of the right type and length; a life cycle that is defined; a
platform profile that is known. Claims nobody has a name for are listed in `unknown_claims` and mean nothing.

Everything that comes out is untrusted until `verification.cca` has seen it.
"""

from __future__ import annotations

import base64
import binascii
import json
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from moorline.errors import Malformed
from moorline.evidence import eat_cbor
from moorline.evidence.eat_cbor import Claims, Cose, Encoding, Item, Tag

TAG_LEGACY: Final = 399
TAG_CMW: Final = 907
LEGACY_PROFILE: Final = "http://arm.com/CCA-SSD/1.0.0"
PROFILE: Final = "tag:arm.com,2023:cca_platform#1.0.0"
REALM_PROFILES: Final = ("tag:arm.com,2023:realm#1.0.0", "tag:arm.com,2024:realm#2.0.0")

_PLATFORM: Final = 44234
_REALM: Final = 44241
_EAT_CWT: Final = (263, "application/eat+cwt")
_CMW_EVIDENCE: Final = 4

_PROFILE: Final = 265
_CHALLENGE: Final = 10
_INSTANCE: Final = 256
_LIFECYCLE: Final = 2395
_IMPLEMENTATION: Final = 2396
_COMPONENTS: Final = 2399
_SERVICE: Final = 2400
_CONFIG: Final = 2401
_HASH: Final = 2402
_PLATFORM_NAMES: Final = {
    _PROFILE: "cca-platform-profile",
    _CHALLENGE: "cca-platform-challenge",
    _IMPLEMENTATION: "cca-platform-implementation-id",
    _INSTANCE: "cca-platform-instance-id",
    _CONFIG: "cca-platform-config",
    _LIFECYCLE: "cca-platform-lifecycle",
    _COMPONENTS: "cca-platform-sw-components",
    _SERVICE: "cca-platform-service-indicator",
    _HASH: "cca-platform-hash-algo-id",
}

_REALM_PERSONALIZATION: Final = 44235
_REALM_HASH: Final = 44236
_REALM_KEY: Final = 44237
_REALM_INITIAL: Final = 44238
_REALM_EXTENSIBLE: Final = 44239
_REALM_KEY_HASH: Final = 44240
_REALM_MEC: Final = 44243
_REALM_NAMES: Final = {
    _PROFILE: "cca-realm-profile",
    _CHALLENGE: "cca-realm-challenge",
    _INSTANCE: "cca-realm-instance-id",
    _REALM_PERSONALIZATION: "cca-realm-personalization-value",
    _REALM_HASH: "cca-realm-hash-algo-id",
    _REALM_KEY: "cca-realm-public-key",
    _REALM_INITIAL: "cca-realm-initial-measurement",
    _REALM_EXTENSIBLE: "cca-realm-extensible-measurements",
    _REALM_KEY_HASH: "cca-realm-public-key-hash-algo-id",
    _REALM_MEC: "cca-realm-mec-policy",
}

_COMPONENT_NAMES: Final = {
    1: "component-type",
    2: "measurement-value",
    4: "version",
    5: "signer-id",
    6: "hash-algo-id",
}

_COSE_KEY_NAMES: Final = {1: "kty", 2: "kid", 3: "alg", -1: "crv", -2: "x", -3: "y"}

DIGEST_SIZES: Final = (32, 48, 64)
UEID_BYTES: Final = 33
_UEID_RANDOM: Final = 0x01
_RAW_P384: Final = 97
HASHES: Final = ("sha-256", "sha-384", "sha-512")


class Lifecycle(StrEnum):
    """The ranges of the life cycle claim: the high byte says the state, the low byte is the implementation's."""

    UNKNOWN = "unknown"
    ASSEMBLY_AND_TEST = "assembly-and-test"
    ROT_PROVISIONING = "rot-provisioning"
    SECURED = "secured"
    NON_ROT_DEBUG = "non-rot-debug"
    RECOVERABLE_ROT_DEBUG = "recoverable-rot-debug"
    DECOMMISSIONED = "decommissioned"


_LIFECYCLES: Final = {
    0x00: Lifecycle.UNKNOWN,
    0x10: Lifecycle.ASSEMBLY_AND_TEST,
    0x20: Lifecycle.ROT_PROVISIONING,
    0x30: Lifecycle.SECURED,
    0x40: Lifecycle.NON_ROT_DEBUG,
    0x50: Lifecycle.RECOVERABLE_ROT_DEBUG,
    0x60: Lifecycle.DECOMMISSIONED,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class SoftwareComponent:
    """One measured component of the platform. Absent members are None."""

    component_type: str | None
    measurement: bytes
    version: str | None
    signer_id: bytes
    hash_algorithm: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class PlatformClaims:
    """What a platform token says. `challenge` binds it to a realm's key; `lifecycle` is the number, see `state`."""

    profile: str
    challenge: bytes
    implementation_id: bytes
    instance_id: bytes
    config: bytes
    lifecycle: int
    hash_algorithm: str
    components: tuple[SoftwareComponent, ...]
    verification_service: str | None
    unknown_claims: tuple[int | str, ...]

    @property
    def legacy(self) -> bool:
        """The profile is the deprecated one."""
        return self.profile == LEGACY_PROFILE

    @property
    def state(self) -> Lifecycle:
        """The life cycle by its range."""
        return _LIFECYCLES[self.lifecycle >> 8]


@dataclass(frozen=True, slots=True, kw_only=True)
class RealmClaims:
    """What a realm token says. `public_key` is the claim as it stands: that is what the platform's challenge hashes.

    `point` is the same key as an uncompressed P-384 point, whichever form the claim has.
    """

    profile: str | None
    challenge: bytes
    personalization: bytes
    initial_measurement: bytes
    extensible_measurements: tuple[bytes, ...]
    hash_algorithm: str
    public_key: bytes
    point: bytes
    public_key_hash_algorithm: str
    instance_id: bytes | None
    mec_policy: int | None
    unknown_claims: tuple[int | str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class PlatformToken:
    """A platform token: the signed message and the claims in it."""

    cose: Cose
    claims: PlatformClaims


@dataclass(frozen=True, slots=True, kw_only=True)
class RealmToken:
    """A realm token: the signed message and the claims in it."""

    cose: Cose
    claims: RealmClaims


@dataclass(frozen=True, slots=True, kw_only=True)
class CcaToken:
    """The collection. `tag` is 399 or 907."""

    tag: int
    platform: PlatformToken
    realm: RealmToken


_SIGN1: Final[frozenset[int | None]] = frozenset({eat_cbor.TAG_SIGN1})


def parse_token(data: bytes) -> CcaToken:
    """The CCA token in `data`, untrusted. Raises only Malformed (`eat.*`, `cca.*`)."""
    return token_of(eat_cbor.decode(data, encoding=Encoding.PREFERRED))


def token_of(item: Item) -> CcaToken:
    """As `parse_token`, of an item that stands inside another message."""
    if not isinstance(item, Tag) or item.number not in (TAG_LEGACY, TAG_CMW):
        raise Malformed("cca.not_token", "not a CCA token", expected="a map under CBOR tag 399 or 907")
    if not isinstance(item.value, dict) or set(item.value) != {_PLATFORM, _REALM}:
        raise Malformed("cca.not_token", "a CCA token is a platform token and a realm token, and nothing else")
    platform, realm = (_part(item.value[key], item.number) for key in (_PLATFORM, _REALM))
    return CcaToken(tag=item.number, platform=parse_platform_token(platform), realm=parse_realm_token(realm))


def parse_platform_token(data: bytes) -> PlatformToken:
    """A platform token by itself, untrusted. Raises only Malformed."""
    cose = eat_cbor.parse_cose(data, encoding=Encoding.PREFERRED, tags=_SIGN1)
    return PlatformToken(cose=cose, claims=parse_platform_claims(cose.payload))


def parse_realm_token(data: bytes) -> RealmToken:
    """A realm token by itself, untrusted. Raises only Malformed."""
    cose = eat_cbor.parse_cose(data, encoding=Encoding.PREFERRED, tags=_SIGN1)
    return RealmToken(cose=cose, claims=parse_realm_claims(cose.payload))


def parse_platform_claims(data: bytes) -> PlatformClaims:
    """The claims of a platform token. Raises only Malformed."""
    return _platform_claims(eat_cbor.decode(data, encoding=Encoding.PREFERRED))


def _part(item: Item, tag: int) -> bytes:
    if tag == TAG_LEGACY:
        if not isinstance(item, bytes):
            raise Malformed("cca.not_token", "under tag 399 each token is a byte string")
        return item
    if not isinstance(item, list) or len(item) not in (2, 3) or item[0] not in _EAT_CWT or not isinstance(item[1], bytes):
        raise Malformed("cca.not_token", "under tag 907 each token is a CMW record", expected="[263, token]")
    if len(item) == 3 and item[2] != _CMW_EVIDENCE:
        raise Malformed("cca.not_token", "the CMW record says that it is no evidence", expected=_CMW_EVIDENCE)
    return item[1]


def _platform_claims(item: Item) -> PlatformClaims:
    claims = Claims(item, _PLATFORM_NAMES)
    profile = claims.text(_PROFILE)
    if profile not in (LEGACY_PROFILE, PROFILE):
        raise Malformed("cca.platform_profile", "unknown platform profile", expected=PROFILE, got=profile)
    return PlatformClaims(
        profile=profile,
        challenge=claims.octets(_CHALLENGE, DIGEST_SIZES),
        implementation_id=claims.octets(_IMPLEMENTATION, (32,)),
        instance_id=_ueid(claims),
        config=claims.octets(_CONFIG),
        lifecycle=_lifecycle(claims),
        hash_algorithm=_hash(claims, _HASH),
        components=tuple(_component(entry) for entry in claims.array(_COMPONENTS)),
        verification_service=claims.text(_SERVICE) if _SERVICE in claims else None,
        unknown_claims=claims.unknown(),
    )


def _component(item: Item) -> SoftwareComponent:
    claims = Claims(item, _COMPONENT_NAMES)
    return SoftwareComponent(
        component_type=claims.text(1) if 1 in claims else None,
        measurement=claims.octets(2, DIGEST_SIZES),
        version=claims.text(4) if 4 in claims else None,
        signer_id=claims.octets(5, DIGEST_SIZES),
        hash_algorithm=claims.text(6) if 6 in claims else None,
    )


def _ueid(claims: Claims) -> bytes:
    value = claims.octets(_INSTANCE, (UEID_BYTES,))
    if value[0] != _UEID_RANDOM:
        raise Malformed("cca.instance_id", "the instance id is not a UEID of type RAND (RFC 9711 4.2.1)", got=value[:1])
    return value


def _lifecycle(claims: Claims) -> int:
    value = claims.number(_LIFECYCLE, low=0, high=0xFFFF)
    if value >> 8 not in _LIFECYCLES:
        raise Malformed("cca.lifecycle", "no such life cycle state", got=hex(value))
    return value


def _hash(claims: Claims, key: int) -> str:
    name = claims.text(key)
    if name not in HASHES:
        raise Malformed("cca.hash_algorithm", "unknown hash algorithm", expected=" or ".join(HASHES), got=name)
    return name


def parse_realm_claims(data: bytes) -> RealmClaims:
    """The claims of a realm token. Raises only Malformed."""
    claims = Claims(eat_cbor.decode(data, encoding=Encoding.PREFERRED), _REALM_NAMES)
    profile = claims.text(_PROFILE) if _PROFILE in claims else None
    if profile is not None and profile not in REALM_PROFILES:
        raise Malformed("cca.realm_profile", "unknown realm profile", expected=" or ".join(REALM_PROFILES), got=profile)
    public_key = claims.octets(_REALM_KEY)
    extensible = claims.array(_REALM_EXTENSIBLE)
    if len(extensible) != 4:
        raise Malformed("cca.extensible_measurements", "a realm has four extensible measurements", got=len(extensible))
    return RealmClaims(
        profile=profile,
        challenge=claims.octets(_CHALLENGE, (64,)),
        personalization=claims.octets(_REALM_PERSONALIZATION, (64,)),
        initial_measurement=claims.octets(_REALM_INITIAL, DIGEST_SIZES),
        extensible_measurements=tuple(_digest(value) for value in extensible),
        hash_algorithm=_hash(claims, _REALM_HASH),
        public_key=public_key,
        point=_raw_point(public_key) if profile is None else _cose_key_point(public_key),
        public_key_hash_algorithm=_hash(claims, _REALM_KEY_HASH),
        instance_id=claims.octets(_INSTANCE) if _INSTANCE in claims else None,
        mec_policy=claims.number(_REALM_MEC, low=0, high=0xFFFF) if _REALM_MEC in claims else None,
        unknown_claims=claims.unknown(),
    )


def _digest(value: Item) -> bytes:
    if not isinstance(value, bytes) or len(value) not in DIGEST_SIZES:
        raise Malformed("cca.extensible_measurements", "an extensible measurement is not a digest")
    return value


def _raw_point(key: bytes) -> bytes:
    if len(key) != _RAW_P384 or key[0] != 0x04:
        raise Malformed("cca.realm_key", "a legacy realm key is a P-384 point, uncompressed", expected=_RAW_P384)
    return key


def _cose_key_point(key: bytes) -> bytes:
    """RFC 9052 7 and RFC 9053 7.1.1: key type EC2 (2), curve P-384 (2), both coordinates of 48 bytes."""
    claims = Claims(eat_cbor.decode(key, encoding=Encoding.PREFERRED), _COSE_KEY_NAMES)
    if claims.required(1) != 2 or claims.required(-1) != 2:
        raise Malformed("cca.realm_key", "the realm key is not a P-384 key", expected="kty 2, crv 2")
    return b"\x04" + claims.octets(-2, (48,)) + claims.octets(-3, (48,))


# ---------------------------------------------------------------- a key attested by a realm (Parsec)


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyAttestation:
    """Parsec's key attestation: a key and a nonce, vouched for by a CCA token whose challenge is the SHA-512 of both.

    `signed` is the key attestation token as it stands: those bytes are what the realm's challenge hashes.
    """

    signed: bytes
    nonce: bytes
    public_key: bytes
    """Uncompressed P-256 point."""
    token: CcaToken


_KEY_ATTESTATION: Final = 601
_CONFIRMATION: Final = 8


def parse_key_attestation(data: bytes) -> KeyAttestation:
    """The bundle in `data`: `kat` (CBOR tag 601) and `pat` (a CCA token). Raises only Malformed."""
    parts = eat_cbor.map_with_bytes(data, encoding=Encoding.PREFERRED)
    if set(parts) != {"kat", "pat"}:
        raise Malformed("cca.not_key_attestation", "not a key attestation", expected="kat and pat")
    kat, signed = parts["kat"]
    if not isinstance(kat, Tag) or kat.number != _KEY_ATTESTATION:
        raise Malformed("cca.not_key_attestation", "the key attestation token has tag 601")
    claims = Claims(kat.value, {_CHALLENGE: "nonce", _CONFIRMATION: "cnf"})
    key = Claims(Claims(claims.required(_CONFIRMATION), {1: "COSE_Key"}).required(1), _COSE_KEY_NAMES)
    if key.required(1) != 2 or key.required(-1) != 1:
        raise Malformed("cca.not_key_attestation", "the attested key is not a P-256 key", expected="kty 2, crv 1")
    return KeyAttestation(
        signed=signed,
        nonce=claims.octets(_CHALLENGE, tuple(range(8, 65))),
        public_key=b"\x04" + key.octets(-2, (32,)) + key.octets(-3, (32,)),
        token=token_of(parts["pat"][0]),
    )


# ---------------------------------------------------------------- the JSON form of platform claims


_JSON_OCTETS: Final = frozenset({_CHALLENGE, _IMPLEMENTATION, _INSTANCE, _CONFIG})
_JSON_KEYS: Final = {name: key for key, name in _PLATFORM_NAMES.items()}
_JSON_COMPONENT_KEYS: Final = {
    "component-type": 1,
    "measurement-value": 2,
    "version": 4,
    "signer-id": 5,
    "algorithm-id": 6,
}
_MAX_JSON: Final = 64 * 1024


def parse_platform_claims_json(data: bytes) -> PlatformClaims:
    """Platform claims in the JSON form that verifiers exchange (base64 for byte strings); never signed.

    Raises only Malformed. Members that are no platform claim are refused: unlike in CBOR, they are a slip of a person.
    """
    if len(data) > _MAX_JSON:
        raise Malformed("cca.json", "the claims are too large", expected=f"<= {_MAX_JSON} bytes", got=len(data))
    try:
        document = json.loads(data, object_pairs_hook=_no_duplicates)
    except Malformed:
        raise
    except (ValueError, RecursionError) as error:
        raise Malformed("cca.json", "not a JSON document", got=type(error).__name__) from None
    return _platform_claims(_from_json(document))


def _no_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    if len({name for name, _ in pairs}) != len(pairs):
        raise Malformed("cca.json", "a JSON object has one member twice")
    return dict(pairs)


def _from_json(document: object) -> Item:
    if not isinstance(document, dict) or not set(document) <= set(_JSON_KEYS):
        raise Malformed("cca.json", "not an object of platform claims", expected=", ".join(_JSON_KEYS))
    claims: dict[int | str, Item] = {}
    for name, value in document.items():
        key = _JSON_KEYS[name]
        if key == _COMPONENTS:
            claims[key] = [_component_from_json(entry) for entry in value] if isinstance(value, list) else None
        else:
            claims[key] = _octets(value) if key in _JSON_OCTETS else _scalar(value)
    return claims


def _component_from_json(entry: object) -> Item:
    if not isinstance(entry, dict) or not set(entry) <= set(_JSON_COMPONENT_KEYS):
        raise Malformed("cca.json", "not a software component", expected=", ".join(_JSON_COMPONENT_KEYS))
    return {
        _JSON_COMPONENT_KEYS[name]: _octets(value) if name in ("measurement-value", "signer-id") else _scalar(value)
        for name, value in entry.items()
    }


def _octets(value: object) -> bytes:
    if not isinstance(value, str):
        raise Malformed("cca.json", "a byte string is written in base64")
    try:
        return base64.b64decode(value, validate=True)
    except (binascii.Error, ValueError):
        raise Malformed("cca.json", "not base64", got=value) from None


def _scalar(value: object) -> Item:
    if isinstance(value, str) or (isinstance(value, int) and not isinstance(value, bool)):
        return value
    raise Malformed("cca.json", "a claim is a text or an integer", got=type(value).__name__)
