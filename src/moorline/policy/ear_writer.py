"""Writes an Attestation Result as the claims of a token (policy.ear): JSON with sorted members, ASCII, no spaces.

Ten thousand hosts that boot alike have the same findings, capabilities and submodules in every token; what differs is a few
hundred bytes. A `Writer` puts a token together from texts, and keeps those of parts that come again: findings and
capabilities by what they say, vectors and submodules while they are the very same objects (policy.host_alike shares them).
The members stand in the order in which sorting puts them, so the text is what a serialiser would write of the whole
(tests/hosts/test_alike.py).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import lru_cache
from typing import Final, TypeVar

from moorline.rats import AttestationResult, CapabilityLevel, Finding, Submodule, Tier
from moorline.wire import base64url

PROFILE: Final = "tag:ietf.org,2026:rats/ear#04"
OURS: Final = "moorline"
POLICY_ID: Final = "ni:///sha-256;"
HEADER: Final = base64url.encode(b'{"alg":"ES256","typ":"JWT"}')
_KEPT: Final = 1024
_WRITER: Final = {"developer": "moorline", "build": "moorline verifier"}

Part = TypeVar("Part")

_json: Final = json.JSONEncoder(separators=(",", ":"), sort_keys=True, ensure_ascii=True).encode


class Writer:
    """Writes results for one audience: the trust domain of the Relying Parties."""

    def __init__(self, audience: str) -> None:
        self._head = f'{{"aud":{_json(audience)},"ear_verifier_id":{_json(_WRITER)},"eat_profile":{_json(PROFILE)}'
        self._kept: dict[int, tuple[object, str]] = {}

    def signing_input(self, result: AttestationResult) -> bytes:
        """The bytes to sign with ES256: header and claims of the token."""
        appraisal = (
            f'{{"ear_appraisal_policy_ids":[{_word(POLICY_ID + _b64(result.policy_digest))}],'
            f'"ear_status":"{result.status.word}","ear_trustworthiness_vector":{self._once(result.vector, _vector)},'
            f'"ear_verifier_claims":{{"{OURS}":{_private(result)}}},"eat_nonce":"{_b64(result.nonce)}"}}'
        )
        claims = (
            f'{self._head},"exp":{result.expires:d},"iat":{result.issued:d},"iss":{_word(result.verifier)},'
            f'"submods":{{{_json(result.subject)}:{appraisal}{self._parts(result)}}}}}'
        )
        return HEADER + b"." + base64url.encode(claims.encode("ascii"))

    def _parts(self, result: AttestationResult) -> str:
        prefix = _json(result.subject)[:-1]
        return "".join([f",{prefix}/{text}" for text in self._once(result.submodules, _submodules).splitlines()])

    def _once(self, part: Part, write: Callable[[Part], str]) -> str:
        kept = self._kept.get(id(part))
        if kept is not None and kept[0] is part:  # held here, so that its id is nobody else's
            return kept[1]
        if len(self._kept) >= _KEPT:
            self._kept.clear()
        text = write(part)
        self._kept[id(part)] = part, text
        return text


def _submodules(parts: tuple[Submodule, ...]) -> str:
    """A line each, `name":{...}`; JSON has no line break in a text."""
    return "\n".join(f"{_json(part.name)[1:]}:{_part(part)}" for part in sorted(parts, key=lambda part: part.name))


def _part(part: Submodule) -> str:
    return _json(
        {
            "ear_status": part.status.word,
            "ear_trustworthiness_vector": _tiers(part.vector),
            "ear_verifier_claims": {OURS: {"doubts": list(part.doubts)}},
        }
    )


def _vector(vector: dict[str, Tier]) -> str:
    return _json(_tiers(vector))


def _tiers(vector: dict[str, Tier]) -> dict[str, int]:
    return {claim: tier.value for claim, tier in vector.items() if tier is not Tier.NONE}


def _private(result: AttestationResult) -> str:
    findings = ",".join([_finding(one) for one in result.findings])
    capabilities = ",".join([_capability(one) for one in result.capabilities])
    return (
        f'{{"bound":{_json(result.bound)},"capabilities":[{capabilities}],"findings":[{findings}],'
        f'"root":"{result.root.value}","simulated_allowed":{"true" if result.simulated_allowed else "false"}}}'
    )


@lru_cache(maxsize=_KEPT)
def _finding(finding: Finding) -> str:
    return _json(
        {
            "code": finding.code,
            "outcome": finding.outcome.value,
            "claim": finding.claim,
            "says": finding.says,
            "expected": finding.expected,
            "got": finding.got,
            "remedy": finding.remedy,
        }
    )


@lru_cache(maxsize=_KEPT)
def _capability(one: CapabilityLevel) -> str:
    return _json({"capability": one.capability, "level": one.level.word, "value": one.value})


@lru_cache(maxsize=_KEPT)
def _word(text: str) -> str:
    return _json(text)


def _b64(data: bytes) -> str:
    return base64url.encode(data).decode("ascii")
