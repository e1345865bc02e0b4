"""PSA evidence: the attestation token of an Arm device with TrustZone (RFC 9783). No trust, no crypto.

Two generations of claim keys are in use, and never together in one token:

* `PSA_IOT_PROFILE_1` (draft-tschofenig-rats-psa-token-05 and before): keys -75000 to -75010; the profile is a text that
  implementations choose freely, and when absent it is that one; a token may say that there are no software measurements;
* the EAT keys of RFC 9783, whose profile is `tag:psacertified.org,2023:psa#tfm`, or in drafts `http://arm.com/psa/2.0.0`.
  Any other profile would change what the claims mean, and is refused.

What makes a token well-formed: preferred, definite CBOR; tag 18 (COSE_Sign1) or 17 (COSE_Mac0); an algorithm in the
protected header (tokens with an empty one exist, and leave the choice to the carrier: refused); every mandatory claim,
of the right type and length; a life cycle that is defined. What comes out is untrusted until `verification.psa` has seen it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from moorline.errors import Malformed
from moorline.evidence import eat_cbor
from moorline.evidence.eat_cbor import Claims, Cose, Encoding, Item

IOT_PROFILE_1: Final = "PSA_IOT_PROFILE_1"
DRAFT_PROFILE_2: Final = "http://arm.com/psa/2.0.0"
TFM_PROFILE: Final = "tag:psacertified.org,2023:psa#tfm"

DIGEST_SIZES: Final = (32, 48, 64)
UEID_BYTES: Final = 33
_UEID_RANDOM: Final = 0x01
_CERTIFICATION: Final = re.compile(r"[0-9]{13}-[0-9]{5}")


class Lifecycle(StrEnum):
    """The ranges of the security life cycle (RFC 9783 4.3.1)."""

    UNKNOWN = "unknown"
    ASSEMBLY_AND_TEST = "assembly-and-test"
    ROT_PROVISIONING = "psa-rot-provisioning"
    SECURED = "secured"
    NON_ROT_DEBUG = "non-psa-rot-debug"
    RECOVERABLE_ROT_DEBUG = "recoverable-psa-rot-debug"
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
class _Keys:
    """The key of each claim in one generation."""

    profile: int
    client_id: int
    lifecycle: int
    implementation_id: int
    boot_seed: int
    certification: int
    components: int
    no_measurements: int | None
    nonce: int
    instance_id: int
    service: int

    def names(self) -> dict[int, str]:
        named = {
            self.profile: "psa-profile",
            self.client_id: "psa-client-id",
            self.lifecycle: "psa-security-lifecycle",
            self.implementation_id: "psa-implementation-id",
            self.boot_seed: "psa-boot-seed",
            self.certification: "psa-certification-reference",
            self.components: "psa-software-components",
            self.nonce: "psa-nonce",
            self.instance_id: "psa-instance-id",
            self.service: "psa-verification-service-indicator",
        }
        return named if self.no_measurements is None else {**named, self.no_measurements: "psa-no-sw-measurement"}


_FIRST: Final = _Keys(
    profile=-75000,
    client_id=-75001,
    lifecycle=-75002,
    implementation_id=-75003,
    boot_seed=-75004,
    certification=-75005,
    components=-75006,
    no_measurements=-75007,
    nonce=-75008,
    instance_id=-75009,
    service=-75010,
)
_EAT: Final = _Keys(
    profile=265,
    client_id=2394,
    lifecycle=2395,
    implementation_id=2396,
    boot_seed=2397,
    certification=2398,
    components=2399,
    no_measurements=None,
    nonce=10,
    instance_id=256,
    service=2400,
)
_COMPONENT_NAMES: Final = {
    1: "measurement-type",
    2: "measurement-value",
    4: "version",
    5: "signer-id",
    6: "measurement-description",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class SoftwareComponent:
    """One measured component. Absent members are None."""

    measurement_type: str | None
    measurement: bytes
    version: str | None
    signer_id: bytes
    description: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class PsaClaims:
    """What a token says. `profile` is as written; `first_generation` says which keys it came with.

    No `components` means that the token says so itself (psa-no-sw-measurement): policy decides.
    """

    profile: str
    first_generation: bool
    nonce: bytes
    client_id: int
    lifecycle: int
    implementation_id: bytes
    instance_id: bytes
    boot_seed: bytes | None
    certification_reference: str | None
    components: tuple[SoftwareComponent, ...]
    verification_service: str | None
    unknown_claims: tuple[int | str, ...]

    @property
    def state(self) -> Lifecycle:
        """The life cycle by its range."""
        return _LIFECYCLES[self.lifecycle >> 8]

    @property
    def from_secure_side(self) -> bool:
        """The caller was a secure partition: client ids above zero (RFC 9783 4.1.2)."""
        return self.client_id > 0

    def measurements_of(self, measurement_type: str) -> tuple[bytes, ...]:
        """The measurements of all components of a type, in their order."""
        return tuple(part.measurement for part in self.components if part.measurement_type == measurement_type)


@dataclass(frozen=True, slots=True, kw_only=True)
class PsaToken:
    """A token: the protected message and the claims in it."""

    cose: Cose
    claims: PsaClaims

    @property
    def authenticated_by_mac(self) -> bool:
        """COSE_Mac0: whoever can check it could have made it."""
        return self.cose.tag == eat_cbor.TAG_MAC0


def parse_token(data: bytes) -> PsaToken:
    """The PSA token in `data`, untrusted. Raises only Malformed (`eat.*`, `psa.*`)."""
    cose = eat_cbor.parse_cose(data, encoding=Encoding.PREFERRED, tags=frozenset({eat_cbor.TAG_SIGN1, eat_cbor.TAG_MAC0}))
    return PsaToken(cose=cose, claims=parse_claims(cose.payload))


def parse_claims(data: bytes) -> PsaClaims:
    """The claims of a token, in CBOR. Raises only Malformed."""
    item = eat_cbor.decode(data, encoding=Encoding.PREFERRED)
    if not isinstance(item, dict):
        raise Malformed("eat.claims", "claims are a map", got=type(item).__name__)
    first, eat = (bool(set(keys.names()) & set(item)) for keys in (_FIRST, _EAT))
    if first and eat:
        raise Malformed("psa.mixed_claims", "the token mixes the claim keys of two profiles")
    keys = _FIRST if first else _EAT
    return _claims(Claims(item, keys.names()), keys, first_generation=first)


def _claims(claims: Claims, keys: _Keys, *, first_generation: bool) -> PsaClaims:
    return PsaClaims(
        profile=_profile(claims, keys, first_generation=first_generation),
        first_generation=first_generation,
        nonce=claims.octets(keys.nonce, DIGEST_SIZES),
        client_id=claims.number(keys.client_id, low=-(1 << 31), high=(1 << 31) - 1),
        lifecycle=_lifecycle(claims, keys.lifecycle),
        implementation_id=claims.octets(keys.implementation_id, (32,)),
        instance_id=_instance_id(claims, keys.instance_id),
        boot_seed=_boot_seed(claims, keys, first_generation=first_generation),
        certification_reference=_certification(claims, keys, first_generation=first_generation),
        components=_components(claims, keys),
        verification_service=claims.text(keys.service) if keys.service in claims else None,
        unknown_claims=claims.unknown(),
    )


def _profile(claims: Claims, keys: _Keys, *, first_generation: bool) -> str:
    if first_generation:
        return claims.text(keys.profile) if keys.profile in claims else IOT_PROFILE_1
    profile = claims.text(keys.profile)
    if profile not in (TFM_PROFILE, DRAFT_PROFILE_2):
        raise Malformed("psa.profile", "unknown profile", expected=f"{TFM_PROFILE} or {DRAFT_PROFILE_2}", got=profile)
    return profile


def _lifecycle(claims: Claims, key: int) -> int:
    value = claims.number(key, low=0, high=0xFFFF)
    if value >> 8 not in _LIFECYCLES:
        raise Malformed("psa.lifecycle", "no such life cycle state (RFC 9783 4.3.1)", got=hex(value))
    return value


def _instance_id(claims: Claims, key: int) -> bytes:
    value = claims.octets(key, (UEID_BYTES,))
    if value[0] != _UEID_RANDOM:
        raise Malformed("psa.instance_id", "the instance id is not a UEID of type RAND (RFC 9783 4.2.1)", got=value[:1])
    return value


def _boot_seed(claims: Claims, keys: _Keys, *, first_generation: bool) -> bytes | None:
    if first_generation:
        return claims.octets(keys.boot_seed, (32,))
    return claims.octets(keys.boot_seed, tuple(range(8, 33))) if keys.boot_seed in claims else None


def _certification(claims: Claims, keys: _Keys, *, first_generation: bool) -> str | None:
    """RFC 9783 4.2.3 fixes the form (EAN-13, hyphen, five digits); the first generation had several."""
    if keys.certification not in claims:
        return None
    value = claims.text(keys.certification)
    if not first_generation and not _CERTIFICATION.fullmatch(value):
        raise Malformed("psa.certification_reference", "not a certification reference (RFC 9783 4.2.3)", got=value)
    return value


def _components(claims: Claims, keys: _Keys) -> tuple[SoftwareComponent, ...]:
    if keys.no_measurements is not None and keys.no_measurements in claims:
        claims.number(keys.no_measurements, low=1, high=1)
        if keys.components in claims:
            raise Malformed("psa.software_components", "the token has software components and says that it has none")
        return ()
    return tuple(_component(entry) for entry in claims.array(keys.components))


def _component(item: Item) -> SoftwareComponent:
    claims = Claims(item, _COMPONENT_NAMES)
    return SoftwareComponent(
        measurement_type=claims.text(1) if 1 in claims else None,
        measurement=claims.octets(2, DIGEST_SIZES),
        version=claims.text(4) if 4 in claims else None,
        signer_id=claims.octets(5, DIGEST_SIZES),
        description=claims.text(6) if 6 in claims else None,
    )
