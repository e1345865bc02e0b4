"""Arm CCA: whole tokens, platform tokens by themselves, and Parsec's key attestation."""

from __future__ import annotations

import json
from typing import Final

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from moorline.cli.evidence_cases import material
from moorline.cli.evidence_cases.case import Case
from moorline.cli.evidence_cases.compare import Facts
from moorline.errors import NotAuthentic, Unavailable
from moorline.evidence import cca, corim
from moorline.policy import rules
from moorline.policy.cca import ComponentReference, reference_of
from moorline.policy.match import OneOf
from moorline.rats import Finding
from moorline.verification.cca import CcaClaims, CpakAnchor, verify_cca, verify_key_attestation, verify_platform
from moorline.verification.verified import Verified

HINTS: Final = frozenset({"cca-token", "cca-platform-token", "parsec-cca"})


def run(case: Case, facts: Facts) -> tuple[Finding, ...]:
    """The findings of one case (`compare.Family`)."""
    entry = case.evidence[0]
    data = case.read(entry.file)
    if entry.hint == "cca-platform-token":
        platform = cca.parse_platform_token(data)
        facts.update(_platform_facts(platform.claims), challenge=platform.claims.challenge.hex())
        facts["sw_components"] = len(platform.claims.components)
        challenge = case.octets("nonce_hex")
        verify_platform(
            platform, challenge=platform.claims.challenge if challenge is None else challenge, anchors=_anchors(case)
        )
        return _no_policy(case)
    if entry.hint == "parsec-cca":
        bundle = cca.parse_key_attestation(data)
        facts.update(token_facts(bundle.token), kat_nonce=bundle.nonce.hex())
        nonce = case.octets("nonce_hex")
        verify_key_attestation(bundle, nonce=bundle.nonce if nonce is None else nonce, anchors=_anchors(case))
        return _no_policy(case)
    verified = verify(case, facts)
    return _appraise(case, verified.value) if case.mode == "policy" else ()


def verify(case: Case, facts: Facts) -> Verified[CcaClaims]:
    """What the case proves about a whole token, before any policy."""
    entry = case.evidence[0]
    if entry.hint != "cca-token":
        raise Unavailable("material.policy_unsupported", "no policy is defined for this kind of evidence", got=entry.hint)
    token = cca.parse_token(case.read(entry.file))
    facts.update(token_facts(token))
    challenge = case.octets("nonce_hex")
    verified = verify_cca(
        token,
        # A case without a nonce asks about authenticity only, so the token's own stands in for it.
        challenge=token.realm.claims.challenge if challenge is None else challenge,
        anchors=_anchors(case),
    )
    _realm_key(case, token)
    return verified


def token_facts(token: cca.CcaToken) -> Facts:
    """What a token says, for people."""
    realm = token.realm.claims
    return {
        **_platform_facts(token.platform.claims),
        "realm_challenge": realm.challenge.hex(),
        "realm_initial_measurement": realm.initial_measurement.hex(),
    }


def _platform_facts(claims: cca.PlatformClaims) -> Facts:
    return {
        "platform_profile": claims.profile,
        "implementation_id": claims.implementation_id.hex(),
        "instance_id": claims.instance_id.hex(),
        "lifecycle": claims.lifecycle,
    }


def _anchors(case: Case) -> tuple[CpakAnchor, ...]:
    """The key that the case names, or else all that its endorsements hold."""
    named = case.text("public_key_file")
    if named is not None:
        return (_anchor(case, material.spki(case.read(named)), None, None),)
    found: list[CpakAnchor] = []
    for entry in case.endorsements:
        data = case.read(entry.file)
        if entry.hint in ("public-key-pem", "public-key-jwk"):
            found.append(_anchor(case, material.spki(data), None, None))
        elif entry.hint in ("corim", "comid"):
            found += [
                _anchor(case, material.spki(key.pem.encode()), key.instance_id, key.implementation_id)
                for key in corim.parse_endorsed_keys(data)
            ]
        elif entry.hint == "cca-trust-anchors-json":
            found += _trust_anchors(case, data)
        else:
            raise Unavailable("material.unsupported", "a kind of endorsement that is not read here", got=entry.hint)
    return tuple(found)


def _anchor(case: Case, spki: bytes, instance_id: bytes | None, implementation_id: bytes | None) -> CpakAnchor:
    root = material.supplied_root(case)
    return CpakAnchor(key=spki, instance_id=instance_id, implementation_id=implementation_id, root=root)


def _trust_anchors(case: Case, data: bytes) -> list[CpakAnchor]:
    try:
        return [
            _anchor(
                case,
                material.spki_of_jwk(item["pkey"]),
                bytes.fromhex(item["instance-id"]),
                bytes.fromhex(item["implementation-id"]),
            )
            for item in json.loads(data)
        ]
    except (ValueError, TypeError, KeyError) as error:
        raise Unavailable("material.key_undecodable", "the trust anchors cannot be read", got=type(error).__name__) from None


def _realm_key(case: Case, token: cca.CcaToken) -> None:
    named = case.text("realm_key_file")
    if named is None:
        return
    key = serialization.load_der_public_key(material.spki(case.read(named)))
    point = (
        key.public_bytes(serialization.Encoding.X962, serialization.PublicFormat.UncompressedPoint)
        if isinstance(key, ec.EllipticCurvePublicKey)
        else None
    )
    if token.realm.claims.point != point:
        raise NotAuthentic("cca.realm_key_mismatch", "the realm's key is not the one expected")


def _no_policy(case: Case) -> tuple[Finding, ...]:
    if case.mode == "policy":
        raise Unavailable("material.policy_unsupported", "no policy is defined for this kind of evidence")
    return ()


def _appraise(case: Case, claims: CcaClaims) -> tuple[Finding, ...]:
    """Reference values of Trustee and rust-ccatoken, for the implementation id of the platform."""
    known = set(case.policy) - {"allow_debug"}
    if known or not any(entry.hint == "cca-reference-json" for entry in case.reference):
        raise Unavailable("material.policy_unsupported", "a demand that is not understood here", got=sorted(known))
    findings: list[Finding] = []
    for entry in case.reference:
        if entry.hint == "cca-reference-json":
            findings += _by_reference(claims, case.read(entry.file))
    if case.policy.get("allow_debug") is False:
        allowed = frozenset({cca.Lifecycle.SECURED})
        demand = OneOf(allowed)
        findings.append(
            rules.judged("cca.lifecycle", claims.platform.state, demand, claim="hardware", remedy="use a secured platform")
        )
    return tuple(findings)


def _by_reference(claims: CcaClaims, data: bytes) -> list[Finding]:
    try:
        document = json.loads(data)
        platforms = [
            frozenset(_component(component) for component in platform["sw-components"])
            for platform in document["platform"]
            if bytes.fromhex(platform["implementation-id"]) == claims.platform.implementation_id
        ]
        realms = [bytes.fromhex(realm["initial-measurement"]) for realm in document.get("realm", [])]
    except (ValueError, TypeError, KeyError) as error:
        raise Unavailable(
            "material.reference_undecodable", "the reference values cannot be read", got=type(error).__name__
        ) from None
    found = frozenset(reference_of(component) for component in claims.platform.components)
    return [
        rules.judged(
            "cca.platform_components", found, OneOf(frozenset(platforms)), claim="executables", remedy="update the firmware"
        ),
        rules.judged(
            "cca.initial_measurement",
            claims.realm.initial_measurement,
            OneOf(frozenset(realms)),
            claim="executables",
            remedy="start the registered image",
        ),
    ]


def _component(component: dict[str, str]) -> ComponentReference:
    return ComponentReference(
        component_type=component.get("component-type"),
        measurement=bytes.fromhex(component["measurement-value"]),
        signer_id=bytes.fromhex(component["signer-id"]),
    )
