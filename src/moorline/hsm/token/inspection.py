"""A token at a glance: healthy or not, what it can do, which keys it holds and what each is for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from moorline.errors import MoorlineError
from moorline.hsm.token.capabilities import Capability, MechanismFacts, probe
from moorline.hsm.token.local import LocalToken
from moorline.hsm.token.port import KeyFacts, Token

_ROLES: Final = (
    ("hsm-identity", "certifies the broker's TLS keys; signs as this HSM towards peers and ledger"),
    ("issuing-ca", "signs identities of functions, devices, hosts and services"),
    ("verifier", "signs attestation results"),
    ("hsm-kem", "agrees on keys with peers"),
    ("wrapping", "wraps key pairs of the pools, sealed-storage keys and launch keys"),
    ("launch-key-", "recomputes launch tokens of one epoch"),
    ("pair/", "shared with one peer HSM, for the profile without forward secrecy"),
    ("pair-ephemeral/", "half of an agreement with a peer that is under way"),
    ("state-counter", "tells a restored database"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyReport:
    """A key and its role. None: the token does not say."""

    label: str
    kind: str
    type: str
    role: str
    sensitive: bool | None
    extractable: bool | None
    never_extractable: bool | None
    local: bool | None
    trust_needed: bool | None
    uses: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenReport:
    """Everything `moor hsm inspect` shows."""

    token: dict[str, Any]
    keys: tuple[KeyReport, ...]
    capabilities: tuple[Capability, ...]
    mechanisms: tuple[MechanismFacts, ...]


def report(token: LocalToken) -> TokenReport:
    """Look at an open token. Raises Unavailable if it is away."""
    found = probe(token)
    health = health_of(token)
    return TokenReport(
        token={
            "health": health,
            "token": token.location.name,
            "manufacturer": found.manufacturer,
            "model": found.model,
            "serial": found.serial,
            "firmware": found.firmware,
            "module_restarts": token.module.restarts,
        },
        keys=keys_of(token),
        capabilities=found.table,
        mechanisms=found.mechanisms,
    )


def report_of(token: Token) -> TokenReport:
    """As `report`; of a token that another process owns only keys and health can be seen from here."""
    if isinstance(token, LocalToken):
        return report(token)
    facts = {"health": health_of(token), "token": "owned by another process: moor hsm serve"}
    return TokenReport(token=facts, keys=keys_of(token), capabilities=(), mechanisms=())


def keys_of(token: Token) -> tuple[KeyReport, ...]:
    """The keys and what they are for."""
    return tuple(_reported(each) for each in token.inspect())


def health_of(token: Token) -> str:
    """`good`, or the code and words of what is wrong."""
    try:
        token.random(8)
        token.inspect()
    except MoorlineError as error:
        return f"{error.says} [{error.code}]"
    return "good"


def role_of(label: str) -> str:
    """What a key of this label is for; empty where Moorline knows no such role."""
    name = label.split("@", maxsplit=1)[0]
    return next((says for role, says in _ROLES if name == role or (role[-1] in "-/" and name.startswith(role))), "")


def _reported(facts: KeyFacts) -> KeyReport:
    return KeyReport(
        label=facts.label,
        kind=facts.kind,
        type=facts.type,
        role=role_of(facts.label),
        sensitive=facts.sensitive,
        extractable=facts.extractable,
        never_extractable=facts.never_extractable,
        local=facts.local,
        trust_needed=facts.trust_needed,
        uses=facts.uses,
    )
