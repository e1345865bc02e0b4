"""A policy as people write it: TOML, one demand for every field of the family's policy, nothing assumed.

    family = "nitro"                     # snp, cca, psa or nitro
    supplied_keys = "software"           # or hardware, if you vouch for the keys on the command line

    [demands]
    debug = { exact = false }
    pcr0 = { one_of = ["0af1...", "77c2..."] }
    pcr3 = { not_required = "any role may run it" }

Bytes are hexadecimal. A field that is missing, unknown, or has more than one demand is Misconfigured("policy_file.*"):
there is no default, and a slip of the pen must not make a policy weaker.
"""

from __future__ import annotations

import dataclasses
import tomllib
import typing
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final

from moorline.errors import Misconfigured
from moorline.policy import cca, nitro, psa, snp
from moorline.policy.match import AllBits, AtLeast, Exact, NotRequired, OneOf
from moorline.rats import EvidenceRoot, Finding
from moorline.verification.verified import Verified

_POLICIES: Final[dict[str, type]] = {
    "snp": snp.SnpPolicy,
    "cca": cca.CcaPolicy,
    "psa": psa.PsaPolicy,
    "nitro": nitro.NitroPolicy,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyFile:
    """A policy for one family, complete. `digest` names it in results."""

    family: str
    supplied_root: EvidenceRoot
    policy: object
    digest: bytes

    def appraise(self, verified: Verified[Any]) -> tuple[Finding, ...]:
        """The findings about what was verified. Simulated roots never count here."""
        appraisals: dict[str, Any] = {
            "snp": snp.appraise_snp,
            "cca": cca.appraise_cca,
            "psa": psa.appraise_psa,
            "nitro": nitro.appraise_nitro,
        }
        findings: tuple[Finding, ...] = appraisals[self.family](verified, self.policy, simulated_allowed=False)
        return findings


def parse_policy_file(data: bytes) -> PolicyFile:
    """The policy in `data`. Raises Misconfigured (`policy_file.*`, `policy.no_reason`)."""
    try:
        document = tomllib.loads(data.decode("utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise Misconfigured("policy_file.toml", "the policy is not TOML", got=str(error)) from None
    if set(document) != {"family", "supplied_keys", "demands"} or document["family"] not in _POLICIES:
        raise Misconfigured(
            "policy_file.keys",
            "a policy has family, supplied_keys and demands",
            expected=f"family one of {', '.join(_POLICIES)}",
            got=", ".join(document),
        )
    if document["supplied_keys"] not in ("software", "hardware"):
        raise Misconfigured("policy_file.supplied_keys", "keys are worth software or hardware")
    family = document["family"]
    kind = _POLICIES[family]
    policy = kind(**_demands(kind, document["demands"]))
    digests: dict[str, Any] = {
        "snp": snp.policy_digest,
        "cca": cca.policy_digest,
        "psa": psa.policy_digest,
        "nitro": nitro.policy_digest,
    }
    return PolicyFile(
        family=family,
        supplied_root=EvidenceRoot(document["supplied_keys"]),
        policy=policy,
        digest=digests[family](policy),
    )


def _demands(kind: type, demands: object) -> dict[str, object]:
    fields = typing.get_type_hints(kind)
    if not isinstance(demands, dict) or set(demands) != set(fields):
        given = set(demands) if isinstance(demands, dict) else set()
        raise Misconfigured(
            "policy_file.demands",
            "every field needs exactly one demand",
            expected=f"also {', '.join(sorted(set(fields) - given)) or 'nothing'}",
            got=f"unknown: {', '.join(sorted(given - set(fields))) or 'none'}",
            remedy='to leave a field open, write { not_required = "the reason" }',
        )
    return {name: _demand(name, _value_type(hint), demands[name]) for name, hint in fields.items()}


def _value_type(hint: object) -> object:
    """The T of `Match[T]`, which is `Exact[T] | OneOf[T] | ...`."""
    exact = typing.get_args(hint)[0]
    return typing.get_args(exact)[0]


def _demand(name: str, kind: object, written: object) -> object:
    if not isinstance(written, dict) or len(written) != 1:
        raise Misconfigured(
            "policy_file.demand", "a demand is one of exact, one_of, at_least, all_bits, not_required", got=name
        )
    ((word, value),) = written.items()
    if word == "exact":
        return Exact(_value(name, kind, value))
    if word == "at_least":
        return AtLeast(_value(name, kind, value))
    if word == "one_of" and isinstance(value, list) and value:
        return OneOf(frozenset(_value(name, kind, one) for one in value))
    if word == "all_bits" and kind is int and isinstance(value, int):
        return AllBits(value)
    if word == "not_required" and isinstance(value, str):
        return NotRequired(value)
    raise Misconfigured("policy_file.demand", "a demand that is not understood", got=f"{name}: {word}")


def _value(name: str, kind: object, value: object) -> Any:  # noqa: ANN401 - the type of the policy's field
    try:
        return _converted(kind, value)
    except (ValueError, TypeError, KeyError) as error:
        raise Misconfigured(
            "policy_file.value", "a value does not have the type of its field", expected=str(kind), got=f"{name}: {value}"
        ) from error


def _converted(kind: object, value: object) -> object:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is bytes and isinstance(value, str):
        return bytes.fromhex(value)
    if kind in (bool, int, str) and type(value) is kind:
        return value
    if isinstance(kind, type) and issubclass(kind, StrEnum) and isinstance(value, str):
        return kind(value)
    if dataclasses.is_dataclass(kind) and isinstance(kind, type) and isinstance(value, dict):
        hints = typing.get_type_hints(kind)
        return kind(**{field: _optional(hint, value.get(field)) for field, hint in hints.items()})
    if origin in (tuple, frozenset) and isinstance(value, list):
        return _collected(origin, arguments, value)
    raise TypeError(kind)


def _collected(origin: object, arguments: tuple[object, ...], value: list[object]) -> object:
    if origin is frozenset:
        return frozenset(_converted(arguments[0], one) for one in value)
    if len(arguments) == 2 and arguments[1] is Ellipsis:
        return tuple(_converted(arguments[0], one) for one in value)
    return tuple(_converted(kind, one) for kind, one in zip(arguments, value, strict=True))


def _optional(hint: object, value: object) -> object:
    arguments = typing.get_args(hint)
    if type(None) in arguments:
        return None if value is None else _converted(next(one for one in arguments if one is not type(None)), value)
    return _converted(hint, value)
