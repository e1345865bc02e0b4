"""The Attestation Result as a token: EAR (draft-ietf-rats-ear-04) in a JWT, ES256 and nothing else.

1. The header is the one header we write, byte for byte: no `alg` to choose, no key to fetch, no extension.
2. The signature is verified under the key the caller pins, over the bytes as received, before a claim is read.
3. Profile, audience, dates: a result is a lease and ends by itself; clock skew allowed is SKEW_S and no more.
4. Every claim has its type; status and vector agree; duplicate members are refused.

What the draft has no claim for stands in `ear_verifier_claims` under our name: root of the evidence, findings, capabilities,
proven identifiers. A token says what the verifier found; what to do with it is the Relying Party's policy.
"""

from __future__ import annotations

import json
from contextlib import suppress
from typing import Any, Final

from cryptography.hazmat.primitives.asymmetric import ec

from moorline.clock import Instant
from moorline.errors import Malformed, NotAuthentic, Refused
from moorline.policy.ear_writer import HEADER, OURS, POLICY_ID, PROFILE, Writer
from moorline.rats import (
    AR4SI_CLAIMS,
    Assurance,
    AttestationResult,
    CapabilityLevel,
    EvidenceRoot,
    Finding,
    Outcome,
    Submodule,
    Tier,
)
from moorline.wire import base64url, keys

__all__ = ["MAX_TOKEN", "PROFILE", "SKEW_S", "Writer", "assemble", "encode", "parse_verified", "signing_input"]

SKEW_S: Final = 5
MAX_TOKEN: Final = 128 * 1024
_CLAIMS: Final = frozenset({"eat_profile", "iss", "aud", "iat", "exp", "ear_verifier_id", "submods"})
_APPRAISAL: Final = frozenset(
    {"ear_status", "ear_trustworthiness_vector", "ear_appraisal_policy_ids", "eat_nonce", "ear_verifier_claims"}
)
_PART: Final = frozenset({"ear_status", "ear_trustworthiness_vector", "ear_verifier_claims"})
_PRIVATE: Final = frozenset({"root", "simulated_allowed", "findings", "capabilities", "bound"})
_FINDING: Final = frozenset({"code", "outcome", "claim", "says", "expected", "got", "remedy"})


def encode(result: AttestationResult, signer: keys.Signer, *, audience: str) -> str:
    """The signed token. `signer` holds a P-256 key; `audience` is the trust domain of the Relying Parties."""
    message = signing_input(result, audience=audience)
    return assemble(message, signer.sign(message))


def signing_input(result: AttestationResult, *, audience: str) -> bytes:
    """The bytes to sign with ES256, for a signer that is elsewhere; `assemble` makes the token.

    Whoever writes many results that have parts in common keeps an `ear_writer.Writer`, which writes the same.
    """
    return Writer(audience).signing_input(result)


def assemble(message: bytes, signature: bytes) -> str:
    """The token from `signing_input` and its signature (r | s, 64 bytes)."""
    return f"{message.decode('ascii')}.{base64url.encode(signature).decode('ascii')}"


def parse_verified(
    token: str, key: keys.PublicKey | tuple[keys.PublicKey, ...], *, now: Instant, audience: str
) -> AttestationResult:
    """The result in `token`, signed by `key`, for `audience`, and holding at `now`. `token` is untrusted.

    While a verifier's key is rotated, `key` is several: one of them must have signed. An empty tuple accepts nothing.
    Raises NotAuthentic("ear.algorithm" | "ear.audience" | "signature.invalid"), Malformed (`ear.*`), and
    Refused("ear.expired" | "ear.not_yet_valid"). It does not decide whether the status is good enough.
    """
    if len(token) > MAX_TOKEN or not token.isascii():
        raise Malformed("ear.not_a_token", "not an attestation result", expected=f"ASCII, <= {MAX_TOKEN} characters")
    parts = token.encode("ascii").split(b".")
    if len(parts) != 3:
        raise Malformed("ear.not_a_token", "not a signed token of three parts", got=len(parts))
    if parts[0] != HEADER:
        raise NotAuthentic("ear.algorithm", "the token is not an ES256 token of ours", expected="ES256, no other header")
    _signed_by_one(key if isinstance(key, tuple) else (key,), _unb64(parts[2]), parts[0] + b"." + parts[1])
    try:
        claims = json.loads(_unb64(parts[1]), object_pairs_hook=_unique)
    except (ValueError, RecursionError):
        raise Malformed("ear.not_json", "the claims are not JSON") from None
    _shape(claims, _CLAIMS)
    if claims["eat_profile"] != PROFILE:
        raise Malformed("ear.profile", "another profile of attestation results", expected=PROFILE, got=claims["eat_profile"])
    if claims["aud"] != audience:
        raise NotAuthentic("ear.audience", "the result is meant for somebody else", expected=audience, got=claims["aud"])
    result = _result(claims)
    if now >= result.expires:
        raise Refused(
            "ear.expired",
            "the attestation result has expired",
            expected=f"< {result.expires}",
            got=now,
            remedy="attest again",
        )
    if result.issued > now + SKEW_S:
        raise Refused(
            "ear.not_yet_valid", "the attestation result is from the future", expected=f"<= {now}", got=result.issued
        )
    return result


def _signed_by_one(known: tuple[keys.PublicKey, ...], signature: bytes, message: bytes) -> None:
    """Raises NotAuthentic unless one of the keys, all of them for ES256, made the signature."""
    fit = [isinstance(one, ec.EllipticCurvePublicKey) and keys.algorithm_of(one) == keys.ES256 for one in known]
    if not fit or not all(fit):
        raise NotAuthentic("ear.algorithm", "the verifier's key is not one for ES256", expected="P-256, one at least")
    for one in known[:-1]:
        with suppress(NotAuthentic):
            keys.verify(one, signature, message)
            return
    keys.verify(known[-1], signature, message)


def _result(claims: dict[str, Any]) -> AttestationResult:
    try:
        subject, appraisal, submodules = _parts(claims["submods"])
        _shape(appraisal, _APPRAISAL)
        ours = appraisal["ear_verifier_claims"][OURS]
        _shape(ours, _PRIVATE)
        (policy_id,) = appraisal["ear_appraisal_policy_ids"]
        vector = _vector_of(appraisal)
        result = AttestationResult(
            subject=_text(subject),
            verifier=_text(claims["iss"]),
            issued=Instant(_integer(claims["iat"])),
            expires=Instant(_integer(claims["exp"])),
            root=EvidenceRoot(ours["root"]),
            simulated_allowed=_flag(ours["simulated_allowed"]),
            vector=vector,
            findings=tuple(_finding(one) for one in ours["findings"]),
            policy_digest=_unb64(_text(policy_id).removeprefix(POLICY_ID).encode("ascii")),
            nonce=_unb64(_text(appraisal["eat_nonce"]).encode("ascii")),
            capabilities=tuple(_capability(one) for one in ours["capabilities"]),
            bound={_text(name): _text(value) for name, value in ours["bound"].items()},
            submodules=submodules,
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        # any other shape than ours gives one of these while it is taken apart
        raise Malformed("ear.claim", "a claim is missing or of the wrong type", got=type(error).__name__) from None
    _consistent(result.status, appraisal)
    return result


def _parts(submods: dict[str, Any]) -> tuple[str, dict[str, Any], tuple[Submodule, ...]]:
    """The subject, its appraisal, and its submodules: `subject` and `subject/...`, and nothing else."""
    subject = min(submods, key=len)
    rest = {name: part for name, part in submods.items() if name != subject}
    if not all(name.startswith(f"{subject}/") for name in rest):
        raise Malformed("ear.claim", "a submodule is of another subject", expected=f"{subject}/...", got=sorted(rest))
    parts = (_submodule(name[len(subject) + 1 :], part) for name, part in sorted(rest.items()))
    return subject, submods[subject], tuple(parts)


def _submodule(name: str, part: dict[str, Any]) -> Submodule:
    _shape(part, _PART)
    doubts = part["ear_verifier_claims"][OURS]["doubts"]
    found = Submodule(name=name, vector=_vector_of(part), doubts=tuple(_text(one) for one in doubts))
    _consistent(found.status, part)
    return found


def _vector_of(appraisal: dict[str, Any]) -> dict[str, Tier]:
    vector = dict.fromkeys(AR4SI_CLAIMS, Tier.NONE)
    for claim, value in appraisal["ear_trustworthiness_vector"].items():
        if claim not in vector:
            raise Malformed("ear.claim", "an unknown trustworthiness claim", got=claim)
        vector[claim] = Tier(_integer(value))
    return vector


def _consistent(status: Tier, appraisal: dict[str, Any]) -> None:
    if status.word != appraisal["ear_status"]:
        raise Malformed("ear.inconsistent", "status and vector disagree", expected=status.word, got=appraisal["ear_status"])


def _finding(item: dict[str, Any]) -> Finding:
    _shape(item, _FINDING)
    return Finding(
        code=_text(item["code"]),
        outcome=Outcome(item["outcome"]),
        claim=_text(item["claim"]),
        says=_text(item["says"]),
        expected=_optional(item["expected"]),
        got=_optional(item["got"]),
        remedy=_optional(item["remedy"]),
    )


def _capability(item: dict[str, Any]) -> CapabilityLevel:
    _shape(item, frozenset({"capability", "level", "value"}))
    return CapabilityLevel(
        capability=_text(item["capability"]),
        level=Assurance[_text(item["level"]).upper()],
        value=_optional(item["value"]),
    )


def _shape(item: object, names: frozenset[str]) -> None:
    if not isinstance(item, dict) or set(item) != names:
        got = sorted(item) if isinstance(item, dict) else type(item).__name__
        raise Malformed("ear.claim", "an object does not have exactly its members", expected=sorted(names), got=got)


def _text(item: object) -> str:
    if not isinstance(item, str):
        raise TypeError
    return item


def _optional(item: object) -> str | None:
    return None if item is None else _text(item)


def _integer(item: object) -> int:
    if not isinstance(item, int) or isinstance(item, bool):
        raise TypeError
    return item


def _flag(item: object) -> bool:
    if not isinstance(item, bool):
        raise TypeError
    return item


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    made = dict(pairs)
    if len(made) != len(pairs):
        raise ValueError
    return made


def _unb64(text: bytes) -> bytes:
    data = base64url.decode(text)
    if data is None:
        raise Malformed("ear.base64", "not base64url in its one encoding")
    return data
