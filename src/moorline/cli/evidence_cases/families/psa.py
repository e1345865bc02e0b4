"""PSA tokens, with keys given as PEM, JWK, certificate, CoRIM or Veraison's endorsement, or a symmetric key."""

from __future__ import annotations

import base64
import binascii
import json
from typing import Final

from moorline.cli.evidence_cases import material
from moorline.cli.evidence_cases.case import Case, Entry
from moorline.cli.evidence_cases.compare import Facts
from moorline.clock import Instant
from moorline.errors import Unavailable
from moorline.evidence import corim, psa
from moorline.policy import rules
from moorline.policy.match import Exact
from moorline.rats import EvidenceRoot, Finding
from moorline.verification.psa import CertifiedIak, IakAnchor, MacAnchor, PsaAnchor, verify_psa
from moorline.verification.verified import Verified

HINTS: Final = frozenset({"psa-token"})
_TYPES: Final = {"spe": "SPE", "nspe": "NSPE"}


def run(case: Case, facts: Facts) -> tuple[Finding, ...]:
    """The findings of one case (`compare.Family`)."""
    verified = verify(case, facts)
    return _appraise(case, verified.value) if case.mode == "policy" else ()


def verify(case: Case, facts: Facts) -> Verified[psa.PsaClaims]:
    """What the case proves, before any policy."""
    token = psa.parse_token(case.read(case.evidence[0].file))
    facts.update(token_facts(token))
    nonce = case.octets("nonce_hex")
    anchors = _anchors(case)
    if case.at is None and any(isinstance(anchor, CertifiedIak) for anchor in anchors):
        raise Unavailable("material.no_time", "certificates are dated, and the case gives no time to appraise at")
    return verify_psa(
        token,
        # A case without a nonce asks about authenticity only, so the token's own stands in for it.
        nonce=token.claims.nonce if nonce is None else nonce,
        anchors=anchors,
        now=Instant(0) if case.at is None else case.at,
    )


def token_facts(token: psa.PsaToken) -> Facts:
    """What a token says, for people."""
    claims = token.claims
    return {
        "profile": claims.profile,
        "nonce": claims.nonce.hex(),
        "implementation_id": claims.implementation_id.hex(),
        "instance_id": claims.instance_id.hex(),
        "lifecycle": claims.lifecycle,
        "sw_components": len(claims.components),
    }


def _anchors(case: Case) -> tuple[PsaAnchor, ...]:
    """The key that the case names, or else all that its endorsements hold."""
    mac, public = case.text("mac_key_file"), case.text("public_key_file")
    if mac is not None:
        return (MacAnchor(key=case.read(mac), instance_id=None),)
    if public is not None:
        return (_key(case.read(public), material.supplied_root(case)),)
    found: list[PsaAnchor] = []
    supplied: list[bytes] = []
    for entry in case.endorsements:
        if entry.hint in ("cert-pem", "cert-der", "chain-pem"):
            supplied += material.certificates(case.read(entry.file))
        else:
            found += _endorsed(case, entry)
    if supplied:
        found.append(
            CertifiedIak(
                path=material.ordered_path(supplied),
                anchors=material.anchors(case),
                root=material.supplied_root(case),
            )
        )
    return tuple(found)


def _endorsed(case: Case, entry: Entry) -> list[PsaAnchor]:
    data, root = case.read(entry.file), material.supplied_root(case)
    if entry.hint in ("public-key-pem", "public-key-jwk"):
        return [_key(data, root)]
    if entry.hint == "mac-key-raw":
        return [MacAnchor(key=data, instance_id=None)]
    if entry.hint in ("corim", "comid"):
        return [
            _key(key.pem.encode(), root, instance_id=key.instance_id, implementation_id=key.implementation_id)
            for key in corim.parse_endorsed_keys(data)
        ]
    if entry.hint == "veraison-endorsement-json":
        return [_veraison(data, root)]
    raise Unavailable("material.unsupported", "a kind of endorsement that is not read here", got=entry.hint)


def _key(
    data: bytes, root: EvidenceRoot, *, instance_id: bytes | None = None, implementation_id: bytes | None = None
) -> IakAnchor:
    return IakAnchor(key=material.spki(data), instance_id=instance_id, implementation_id=implementation_id, root=root)


def _veraison(data: bytes, root: EvidenceRoot) -> IakAnchor:
    try:
        attributes = json.loads(data)["attributes"]
        return _key(attributes["iak-pub"].encode(), root, instance_id=base64.b64decode(attributes["inst-id"], validate=True))
    except (ValueError, TypeError, KeyError, AttributeError, binascii.Error) as error:
        raise Unavailable("material.key_undecodable", "the endorsement cannot be read", got=type(error).__name__) from None


def _appraise(case: Case, claims: psa.PsaClaims) -> tuple[Finding, ...]:
    """`measurements`, by component type, and `allow_debug`."""
    measurements = case.policy.get("measurements", {})
    unknown = set(case.policy) - {"measurements", "allow_debug"}
    if unknown or not isinstance(measurements, dict) or not set(measurements) <= set(_TYPES):
        raise Unavailable("material.policy_unsupported", "a demand that is not understood here", got=sorted(unknown))
    findings = [
        rules.judged(
            "psa.measurement",
            claims.measurements_of(_TYPES[name]),
            Exact((bytes.fromhex(value),)),
            claim="executables",
            remedy="update the firmware, or the reference values",
        )
        for name, value in measurements.items()
    ]
    if case.policy.get("allow_debug") is False:
        demand = Exact(psa.Lifecycle.SECURED)
        findings.append(rules.judged("psa.lifecycle", claims.state, demand, claim="hardware", remedy="use a secured device"))
    return tuple(findings)
