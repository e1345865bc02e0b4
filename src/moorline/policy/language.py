"""The policy language: one demand for every field of the family's policy, nothing assumed (docs/adr/0007).

    family: nitro                     # snp, tdx, sgx, cca, psa, nitro or tpm
    supplied_keys: software           # or hardware, if you vouch for keys on the command line
    references:                       # only if a demand asks a signed set of reference values
      edge-functions: {serial: 7, signers: ["-----BEGIN PUBLIC KEY----- ..."]}
    demands:
      debug: {exact: false}
      pcr0: {reference: edge-functions}
      pcr1: {one_of: [0af1..., 77c2...]}
      pcr3: {not_required: any role may run it}

Demands: `exact`, `at_least`, `one_of`, `all_bits`, `within` and `none_of` (advisories), `reference`, `not_required` with its
reason. Bytes are hexadecimal. `platform` (sgx, tdx) and `host` (tpm) are policies in a policy: their fields are demands too.
A field that is missing, unknown, or has more than one demand is Misconfigured("policy_file.*"): there is no default, and a
slip of the pen must not make a policy weaker.
"""

from __future__ import annotations

import dataclasses
import json
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final

from cryptography.hazmat.primitives import serialization

from moorline.clock import Instant
from moorline.digest import tagged_hash
from moorline.errors import Malformed, Misconfigured
from moorline.policy import cca, nitro, psa, reference_sets, sgx, snp, tdx, tpm
from moorline.policy.intel import NoneOf, Within
from moorline.policy.match import AllBits, AtLeast, Exact, NotRequired, OneOf
from moorline.policy.notation import read_document
from moorline.policy.reference_sets import AcceptedSet, Release, TrustedSet
from moorline.rats import EvidenceRoot, Finding, Outcome
from moorline.wire import keys

_KEYS: Final = frozenset({"family", "supplied_keys", "demands"})
_WORDS: Final = "exact, one_of, at_least, all_bits, within, none_of, reference, not_required"
_RELEASE: Final = NotRequired("only what the set of reference values says is compared with its releases")


@dataclass(frozen=True, slots=True, kw_only=True)
class Language:
    """One family: its policy type, its appraisal, and the digest that names a policy."""

    kind: type
    appraise: Callable[..., tuple[Finding, ...]]
    digest: Callable[[Any], bytes]


FAMILIES: Final = {
    "snp": Language(kind=snp.SnpPolicy, appraise=snp.appraise_snp, digest=snp.policy_digest),
    "tdx": Language(kind=tdx.TdxPolicy, appraise=tdx.appraise_tdx, digest=tdx.tdx_policy_digest),
    "sgx": Language(kind=sgx.SgxPolicy, appraise=sgx.appraise_sgx, digest=sgx.sgx_policy_digest),
    "cca": Language(kind=cca.CcaPolicy, appraise=cca.appraise_cca, digest=cca.policy_digest),
    "psa": Language(kind=psa.PsaPolicy, appraise=psa.appraise_psa, digest=psa.policy_digest),
    "nitro": Language(kind=nitro.NitroPolicy, appraise=nitro.appraise_nitro, digest=nitro.policy_digest),
    "tpm": Language(kind=tpm.TpmPolicy, appraise=tpm.appraise_tpm, digest=tpm.policy_digest),
}
"""Family of a policy -> what knows it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyText:
    """A policy as it is written, complete, its reference values not yet filled in (`resolve`). `digest` names the text."""

    digest: bytes
    family: str
    supplied_root: EvidenceRoot
    trusted: tuple[TrustedSet, ...]
    demands: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """A policy for one family, complete. `digest` names it, with what it vouches for and the sets it was filled from."""

    family: str
    supplied_root: EvidenceRoot
    policy: Any
    sets: tuple[AcceptedSet, ...]
    text: PolicyText
    digest: bytes

    def appraise(self, verified: Any, *, simulated_allowed: bool = False) -> tuple[Finding, ...]:  # noqa: ANN401 - of its family
        """The findings about what was verified, then one for each set: which release it is."""
        appraised = FAMILIES[self.family].appraise(verified, self.policy, simulated_allowed=simulated_allowed)
        return (*appraised, *(self._of_release(one, verified) for one in self.sets))

    @property
    def files(self) -> dict[bytes, frozenset[bytes]]:
        """Digests that measured files may have, by path: of all releases in force, since both run during an update."""
        found: dict[bytes, frozenset[bytes]] = {}
        for release in (release for one in self.sets for release in one.current):
            for path, digests in release.files.items():
                found[path.encode()] = found.get(path.encode(), frozenset()) | frozenset(digests)
        return found

    def _of_release(self, one: AcceptedSet, verified: object) -> Finding:
        expected = f"one of {{{', '.join(release.name for release in one.current)}}} of {one.name}, serial {one.serial}"
        current = next((release for release in one.current if self._conforms(one, release, verified)), None)
        if current is not None:
            return Finding(
                code="reference.release",
                outcome=Outcome.MET,
                claim="executables",
                says="the state is that of a release in force",
                expected=expected,
                got=current.name,
            )
        past = next((release for release in one.superseded if self._conforms(one, release, verified)), None)
        if past is not None:
            return Finding(
                code="reference.superseded",
                outcome=Outcome.NOT_MET,
                claim="executables",
                says="the state is that of a release that is over: an update was undone, or missed",
                expected=expected,
                got=past.name,
                remedy="update to a release that is in force",
            )
        return Finding(
            code="reference.release_unknown",
            outcome=Outcome.NOT_MET,
            claim="executables",
            says="the state is that of no one release of the set",
            expected=expected,
            got="none",
            remedy="install a release, or publish this one",
        )

    def _conforms(self, one: AcceptedSet, release: Release, verified: object) -> bool:
        """Everything that asks this set is as this one release says. The root is not a matter of releases."""
        asked = _built(FAMILIES[self.family].kind, self.text.demands, "", _only(one.name, release))
        findings = FAMILIES[self.family].appraise(verified, asked, simulated_allowed=True)
        return all(f.outcome is not Outcome.NOT_MET or f.code == f"{self.family}.root" for f in findings)


def parse_policy(data: bytes) -> PolicyText:
    """The policy in `data`. Raises Misconfigured (`document.*`, `policy_file.*`, `policy.no_reason`)."""
    document = read_document(data)
    family = document.get("family")
    if set(document) - {"references"} != _KEYS or family not in FAMILIES:
        raise Misconfigured(
            "policy_file.keys",
            "a policy has family, supplied_keys and demands",
            expected=f"family one of {', '.join(FAMILIES)}",
            got=", ".join(map(str, document)),
        )
    if document["supplied_keys"] not in ("software", "hardware"):
        raise Misconfigured("policy_file.supplied_keys", "keys are worth software or hardware")
    trusted = _trusted(document.get("references", {}))
    text = PolicyText(
        digest=tagged_hash("policy-text", data),
        family=family,
        supplied_root=EvidenceRoot(document["supplied_keys"]),
        trusted=trusted,
        demands=document["demands"],
    )
    asked: set[str] = set()

    def noted(name: str, _path: str, _kind: object) -> object:
        asked.add(name)
        return OneOf(frozenset())

    _built(FAMILIES[family].kind, text.demands, "", _Filling(of_set=noted))
    if asked != {one.name for one in trusted}:
        raise Misconfigured(
            "policy_file.references",
            "sets that are asked for and sets that are named under references are not the same",
            expected=", ".join(sorted(asked)) or "none",
            got=", ".join(sorted(one.name for one in trusted)) or "none",
        )
    return text


def resolve(text: PolicyText, files: Iterable[bytes], *, now: Instant, highest: Mapping[str, int]) -> Policy:
    """The policy, its reference values filled in from signed `files` that hold at `now` (`reference_sets.accept`)."""
    sets = reference_sets.accept(files, text.trusted, family=text.family, now=now, highest=highest)

    def filled(name: str, path: str, kind: object) -> object:
        return _from_releases(sets[name].current, path, kind)

    family = FAMILIES[text.family]
    policy = _built(family.kind, text.demands, "", _Filling(of_set=filled))
    held = tuple(sets[name] for name in sorted(sets))
    return Policy(
        family=text.family,
        supplied_root=text.supplied_root,
        policy=policy,
        sets=held,
        text=text,
        digest=tagged_hash(
            "policy-document",
            text.family.encode(),
            text.supplied_root.value.encode(),
            family.digest(policy),
            *(one.digest for one in held),
        ),
    )


def value_types(family: str) -> dict[str, object]:
    """The type of the values of every field of a family's policy, by path (`platform.status`)."""
    return dict(_typed(FAMILIES[family].kind, ""))


def value_of(path: str, kind: object, value: object) -> Any:  # noqa: ANN401 - the type of the policy's field
    """A value as people write it, of the type of its field. Raises Misconfigured("policy_file.value")."""
    try:
        return _converted(kind, value)
    except (ValueError, TypeError, KeyError) as error:
        raise Misconfigured(
            "policy_file.value",
            "a value does not have the type of its field",
            expected=getattr(kind, "__name__", str(kind)),
            got=f"{path}: {value}",
            remedy="quote bytes that consist of digits only" if kind is bytes else None,
        ) from error


def _typed(kind: type, path: str) -> Iterable[tuple[str, object]]:
    for name, hint in typing.get_type_hints(kind).items():
        if isinstance(hint, type) and dataclasses.is_dataclass(hint):
            yield from _typed(hint, f"{path}{name}.")
        elif typing.get_args(hint)[0] is not Within:
            yield path + name, _value_type(hint)


def _value_type(hint: object) -> object:
    """The T of `Match[T]`, which is `Exact[T] | OneOf[T] | ...`."""
    return typing.get_args(typing.get_args(hint)[0])[0]


# ---------------------------------------------------------------- references


@dataclass(frozen=True, slots=True, kw_only=True)
class _Filling:
    """How demands on fields that ask a set are made: from name of the set, path of the field, type of its values.

    With `nothing_else`, fields that ask no set are not asked at all.
    """

    of_set: Callable[[str, str, object], object]
    nothing_else: bool = False


def _only(name: str, release: Release) -> _Filling:
    """Demands of one release on the fields that ask the set `name`; nothing else is asked."""

    def of_set(asked: str, path: str, kind: object) -> object:
        return _from_releases((release,), path, kind) if asked == name else _RELEASE

    return _Filling(of_set=of_set, nothing_else=True)


def _from_releases(releases: tuple[Release, ...], path: str, kind: object) -> object:
    """One of the values of these releases. A release that says nothing about the field adds nothing."""
    texts = [text for release in releases for text in release.values.get(path, ())]
    return OneOf(frozenset(value_of(path, kind, _read(path, text)) for text in texts))


def _read(path: str, text: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise Malformed("reference.value", "a reference value is not written in the policy language", got=path) from None


def _trusted(references: object) -> tuple[TrustedSet, ...]:
    if not isinstance(references, dict):
        raise _bad_reference("not a mapping")
    return tuple(_trusted_set(str(name), written) for name, written in references.items())


def _trusted_set(name: str, written: object) -> TrustedSet:
    if not isinstance(written, dict) or set(written) != {"serial", "signers"}:
        raise _bad_reference(f"{name} needs serial and signers")
    signers, serial = written["signers"], written["serial"]
    if type(serial) is not int or not isinstance(signers, list) or not signers:
        raise _bad_reference(f"{name}: serial is a number, signers a list that is not empty")
    return TrustedSet(name=name, serial=serial, signers=tuple(_signer(name, one) for one in signers))


def _signer(name: str, pem: object) -> keys.PublicKey:
    try:
        key = serialization.load_pem_public_key(str(pem).encode())
        return keys.parse_public(
            key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
        )
    except (ValueError, Malformed):
        raise _bad_reference(f"{name}: a signer is not a public key in PEM, P-256, P-384 or Ed25519") from None


def _bad_reference(got: str) -> Misconfigured:
    return Misconfigured("policy_file.references", "references name sets, with serial and signers", got=got)


# ---------------------------------------------------------------- demands


def _built(kind: type, demands: object, path: str, filling: _Filling) -> Any:  # noqa: ANN401 - of `kind`
    """The policy of `kind` from its demands, field by field."""
    fields = typing.get_type_hints(kind)
    if not isinstance(demands, dict) or set(demands) != set(fields):
        given = set(map(str, demands)) if isinstance(demands, dict) else set()
        raise Misconfigured(
            "policy_file.demands",
            f"every field{' of ' + path.rstrip('.') if path else ''} needs exactly one demand",
            expected=f"also {', '.join(sorted(set(fields) - given)) or 'nothing'}",
            got=f"unknown: {', '.join(sorted(given - set(fields))) or 'none'}",
            remedy="to leave a field open, write {not_required: the reason}",
        )
    made: dict[str, object] = {}
    for name, hint in fields.items():
        if isinstance(hint, type) and dataclasses.is_dataclass(hint):
            made[name] = _built(hint, demands[name], f"{path}{name}.", filling)
        else:
            made[name] = _demand(path + name, hint, demands[name], filling)
    return kind(**made)


def _demand(path: str, hint: object, written: object, filling: _Filling) -> object:
    if not isinstance(written, dict) or len(written) != 1:
        raise Misconfigured("policy_file.demand", f"a demand is one of {_WORDS}", got=path)
    ((word, value),) = written.items()
    demand = _advisories(word, value) if typing.get_args(hint)[0] is Within else _match(path, hint, word, value, filling)
    if demand is None:
        raise Misconfigured("policy_file.demand", "a demand that is not understood", got=f"{path}: {word}")
    return _RELEASE if filling.nothing_else and word != "reference" else demand


def _match(path: str, hint: object, word: object, value: object, filling: _Filling) -> object:  # noqa: PLR0911 - a return a word
    kind = _value_type(hint)
    if word == "exact":
        return Exact(value_of(path, kind, value))
    if word == "at_least":
        return AtLeast(value_of(path, kind, value))
    if word == "one_of" and isinstance(value, list) and value:
        return OneOf(frozenset(value_of(path, kind, one) for one in value))
    if word == "all_bits" and kind is int and type(value) is int and value:
        return AllBits(value)
    if word == "reference" and isinstance(value, str):
        return filling.of_set(value, path, kind)
    if word == "not_required" and isinstance(value, str):
        return NotRequired(value)
    return None


def _advisories(word: object, value: object) -> object:
    if word == "not_required" and isinstance(value, str):
        return NotRequired(value)
    if word not in ("within", "none_of") or not isinstance(value, list) or not all(isinstance(one, str) for one in value):
        return None
    return Within(frozenset(value)) if word == "within" else NoneOf(frozenset(value))


def _converted(kind: object, value: object) -> object:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is bytes and isinstance(value, str):
        return bytes.fromhex(value)
    if kind in (bool, int, str) and type(value) is kind:
        return value
    if isinstance(kind, type) and issubclass(kind, StrEnum) and isinstance(value, str):
        return kind(value)
    if dataclasses.is_dataclass(kind) and isinstance(kind, type) and isinstance(value, dict):
        return _record(kind, value)
    if origin in (tuple, frozenset) and isinstance(value, list):
        return _collected(origin, arguments, value)
    raise TypeError(kind)


def _record(kind: type, value: dict[str, object]) -> object:
    """A value with parts. A part that may be None may be left out; one that nobody knows may not be there."""
    hints = typing.get_type_hints(kind)
    if set(value) - set(hints):
        raise KeyError(set(value) - set(hints))
    return kind(**{field: _optional(hint, value.get(field)) for field, hint in hints.items()})


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
