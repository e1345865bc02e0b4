"""What stands on the ledger: one frozen record a key, and the functions that make the keys.

A key is a path of names (`provider/alpha`, `hsm/alpha/hsm-1`); a value is the deterministic CBOR of its record. Everything a
provider registers is keyed by (registrant, id), so nobody can write over, or revoke, what another registered. Records are
public; a record read from a proof is as trustworthy as the proof (ledger.light_client) and says only that its registrant
claimed it and the state machine let it pass.
"""

from __future__ import annotations

import re
from collections.abc import Hashable
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache
from typing import Annotated, Final, TypeVar, cast

from moorline import nfv
from moorline.clock import Instant
from moorline.errors import Malformed
from moorline.wire import schema
from moorline.wire.schema import Bytes32, Size

R = TypeVar("R")

MAX_RECORD_BYTES: Final = 48 * 1024
_KEPT_BYTES: Final = 8 * 1024
MAX_KEY_CHARS: Final = 400
CONSORTIUM: Final = "consortium"
"""Registrant of what a quorum of authorities revoked for everybody; no provider can have this name."""

Der = Annotated[bytes, Size(at_most=20 * 1024)]
Spki = Annotated[bytes, Size(at_most=256)]
Text = Annotated[str, Size(at_most=256)]
_ADDRESS: Final = re.compile(r"(?:[A-Za-z0-9](?:[A-Za-z0-9.-]*[A-Za-z0-9])?|\[[0-9A-Fa-f:.]+\]):(?P<port>[0-9]{1,5})")
_PATH: Final = re.compile(r"[A-Za-z0-9._~/-]*")
_WORDS: Final = re.compile(r"[ -~]*")
_ID: Final = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,126}[a-z0-9])?")


class Status(StrEnum):
    """Whether a record counts. Only `active` does."""

    ACTIVE = "active"
    SUSPENDED = "suspended"
    REVOKED = "revoked"
    REMOVED = "removed"
    RETIRED = "retired"


class ContractStatus(StrEnum):
    """How far an access contract is. Only `accepted` grants anything."""

    OFFERED = "offered"
    ACCEPTED = "accepted"
    WITHDRAWN = "withdrawn"


class ProposalStatus(StrEnum):
    """Whether a proposal still takes approvals."""

    OPEN = "open"
    EXECUTED = "executed"


class RevocationKind(StrEnum):
    """What kind of thing a revocation names. `id` is a name, a serial number in hex, or a digest in hex."""

    INSTANCE = "instance"
    DEVICE = "device"
    CERTIFICATE = "certificate"
    HOST = "host"
    LAUNCHER = "launcher"
    MEASUREMENT = "measurement"
    CHIP = "chip"
    VENDOR_ROOT = "vendor-root"


@dataclass(frozen=True, slots=True, kw_only=True)
class AuthorityRecord:
    """One authority: CA certificate (signs providers), key of its transactions (SPKI), raw Ed25519 checkpoint key."""

    name: str
    status: Status
    certificate: Der
    transaction_key: Spki
    checkpoint_key: Bytes32
    address: Text


@dataclass(frozen=True, slots=True, kw_only=True)
class ParameterRecord:
    """A number every authority agrees on."""

    name: str
    value: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ProposalRecord:
    """An action that waits for, or had, the approvals it needs. `action` is the encoded body of kind `kind`."""

    id: str
    kind: str
    action: Annotated[bytes, Size(at_most=32 * 1024)]
    proposer: str
    approvals: tuple[str, ...]
    status: ProposalStatus
    expires_ms: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ProviderRecord:
    """A provider and its CA certificates, newest last.

    `retire_at[i]` is when certificate i stops counting, in seconds since the epoch, 0 for not announced.
    """

    name: str
    trust_domain: str
    status: Status
    ca_certificates: tuple[Der, ...]
    retire_at: tuple[int, ...]

    def ca_certificates_at(self, at: Instant) -> tuple[bytes, ...]:
        """The CA certificates that still count at this time, DER."""
        if not any(self.retire_at):
            return self.ca_certificates
        pairs = zip(self.ca_certificates, self.retire_at, strict=True)
        return tuple(der for der, retire in pairs if retire == 0 or at < retire)


@dataclass(frozen=True, slots=True, kw_only=True)
class IssuingCaRecord:
    """An issuing CA (key in the provider's token), certified by the provider."""

    provider: str
    id: str
    status: Status
    certificate: Der


@dataclass(frozen=True, slots=True, kw_only=True)
class HsmRecord:
    """An HSM and where to reach it: `address` is host:port of the attested session, `est_url` of enrolment."""

    provider: str
    id: str
    status: Status
    certificate: Der
    address: Text
    est_url: Text
    kem_public: Annotated[bytes, Size(at_most=2048)]
    signing_public: Spki
    bundle_sequence: int


@dataclass(frozen=True, slots=True, kw_only=True)
class OrchestratorRecord:
    """An orchestrator; `public_key` (SPKI) verifies its launch intents."""

    provider: str
    id: str
    status: Status
    public_key: Spki


@dataclass(frozen=True, slots=True, kw_only=True)
class PackageRule:
    """A package that may run as a service, and the launch measurement it must be seen with."""

    package_digest: Bytes32
    measurement: Annotated[bytes, Size(at_most=64)]


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceRecord:
    """A service: SEC009 use case, packages allowed, channel profiles offered, providers whose devices may call."""

    provider: str
    name: str
    status: Status
    use_case: Text
    packages: tuple[PackageRule, ...]
    profiles: tuple[str, ...]
    callers: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class PlatformRecord:
    """A machine its provider vouches for. `ek_digest` is SHA-256 of the EK's SPKI, `location` e.g. "EU/DE".

    That EK and chip share a box is asserted by the provider, not proven (PROTOCOLS.md 8).
    """

    provider: str
    id: str
    status: Status
    chip_id: Annotated[bytes, Size(at_most=64)]
    product: Text
    ek_digest: Bytes32
    location: Text
    tag_digest: Bytes32
    simulated: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class ReferenceValuesRecord:
    """A set of reference values: `digest` is SHA-256 of the signed document, `kind` its evidence format."""

    provider: str
    id: str
    status: Status
    kind: Text
    digest: Bytes32


@dataclass(frozen=True, slots=True, kw_only=True)
class ContractRecord:
    """`provider` lets devices of `grantee` use `service` under `conditions` (Cedar). Counts only when accepted."""

    id: str
    provider: str
    service: str
    grantee: str
    conditions: Annotated[str, Size(at_most=16 * 1024)]
    profiles: tuple[str, ...]
    status: ContractStatus


@dataclass(frozen=True, slots=True, kw_only=True)
class RevocationRecord:
    """Something that no longer counts, and since when (block time, milliseconds). Never taken back."""

    kind: RevocationKind
    registrant: str
    id: str
    time_ms: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RevocationsRecord:
    """How many things a registrant revoked; `digest` is over their keys in order (`revocation_list.digest_after`)."""

    count: int
    digest: Bytes32


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditAnchorRecord:
    """A checkpoint of a secure log: `root` (RFC 6962) of its first `size` entries. `size` never falls."""

    provider: str
    log: str
    size: int
    root: Bytes32
    time_ms: int


@dataclass(frozen=True, slots=True, kw_only=True)
class IndexRecord:
    """Who took something that must be unique, or (chips) everybody who registered it."""

    holders: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class RootsRecord:
    """The consortium's root certificates, under which authorities are admitted."""

    roots: tuple[Der, ...]


def encode(record: object) -> bytes:
    """The value under a key: deterministic CBOR."""
    return schema.encode(record)


def parse(kind: type[R], value: bytes) -> R:
    """A record from its value; raises only Malformed."""
    found: R = _parsed(cast("Hashable", kind), value) if len(value) <= _KEPT_BYTES else _parse(kind, value)
    return found


def _parse(kind: type[R], value: bytes) -> R:
    return schema.decode(kind, value, max_bytes=MAX_RECORD_BYTES)


_parsed = lru_cache(maxsize=4096)(_parse)
"""Bounded, with _KEPT_BYTES; records are immutable, and a sender's own is read for each transaction."""


def parse_id(text: str, what: str) -> str:
    """`text` if it can name a record: a name, or hex up to 128 digits. Raises Malformed("ledger.name_malformed")."""
    if _ID.fullmatch(text) is None:
        raise Malformed("ledger.name_malformed", f"{what} cannot name a record", expected="1 to 128 of a-z 0-9 -", got=text)
    return text


def parse_name(text: str, what: str) -> str:
    """`text` if it is a name (nfv.parse_name); raises Malformed("ledger.name_malformed")."""
    try:
        return nfv.parse_name(text, what)
    except Malformed as error:
        raise Malformed("ledger.name_malformed", error.says, expected=error.expected, got=text) from None


def parse_address(text: str, what: str) -> str:
    """`text` if it is host:port, or [IPv6]:port, in ASCII; raises Malformed("ledger.address_malformed")."""
    found = _ADDRESS.fullmatch(text)
    if found is None or not 0 < int(found.group("port")) < 1 << 16:
        raise Malformed("ledger.address_malformed", f"{what} is host:port", got=text)
    return text


def parse_url(text: str, what: str) -> str:
    """`text` if it is https://host:port/path without user or query; raises Malformed("ledger.address_malformed")."""
    address, slash, path = text.removeprefix("https://").partition("/")
    if not text.startswith("https://") or (slash and _PATH.fullmatch(path) is None):
        raise Malformed("ledger.address_malformed", f"{what} is https://host:port/path", got=text)
    parse_address(address, what)
    return text


def parse_words(text: str, what: str) -> str:
    """`text` if it is printable ASCII, so that it is what it looks like; raises Malformed("ledger.text_malformed")."""
    if _WORDS.fullmatch(text) is None:
        raise Malformed("ledger.text_malformed", f"{what} is printable ASCII", got=ascii(text))
    return text


# Keys ------------------------------------------------------------------------------------------------------------------


PAIR_LOGS: Final = "pair-"
"""Logs of this name are transcripts of pair keys, anchored by an HSM: size is the pair epoch, root the transcript's hash."""
AUTHORITIES_INDEX: Final = "index/authorities"
"""Key of the `IndexRecord` with the names of the authorities in force."""
ROOTS_KEY: Final = "index/roots"
"""Key of the `RootsRecord`."""


def authority_key(name: str) -> str:
    """Key of an `AuthorityRecord`."""
    return f"authority/{name}"


def parameter_key(name: str) -> str:
    """Key of a `ParameterRecord`."""
    return f"parameter/{name}"


def proposal_key(proposal_id: str) -> str:
    """Key of a `ProposalRecord`."""
    return f"proposal/{proposal_id}"


def provider_key(name: str) -> str:
    """Key of a `ProviderRecord`."""
    return f"provider/{name}"


def issuing_ca_key(provider: str, ca_id: str) -> str:
    """Key of an `IssuingCaRecord`."""
    return f"issuing-ca/{provider}/{ca_id}"


def hsm_key(provider: str, hsm_id: str) -> str:
    """Key of an `HsmRecord`."""
    return f"hsm/{provider}/{hsm_id}"


def orchestrator_key(provider: str, orchestrator_id: str) -> str:
    """Key of an `OrchestratorRecord`."""
    return f"orchestrator/{provider}/{orchestrator_id}"


def service_key(provider: str, name: str) -> str:
    """Key of a `ServiceRecord`."""
    return f"service/{provider}/{name}"


def platform_key(provider: str, platform_id: str) -> str:
    """Key of a `PlatformRecord`."""
    return f"platform/{provider}/{platform_id}"


def reference_values_key(provider: str, values_id: str) -> str:
    """Key of a `ReferenceValuesRecord`."""
    return f"reference-values/{provider}/{values_id}"


def contract_key(contract_id: str) -> str:
    """Key of a `ContractRecord`."""
    return f"contract/{contract_id}"


def revocation_key(kind: RevocationKind, registrant: str, revoked_id: str) -> str:
    """Key of a `RevocationRecord`; absence of it is what a reader wants proven."""
    return f"revocation/{kind.value}/{registrant}/{revoked_id}"


def revocations_index_key(registrant: str) -> str:
    """Key of the `RevocationsRecord` of a registrant; absent where revocations are not numbered."""
    return f"index/revocations/{registrant}"


def numbered_revocation_index_key(registrant: str, number: int) -> str:
    """Key of the `IndexRecord` naming the key of the n-th `RevocationRecord` of a registrant, counted from 1."""
    return f"index/revocation/{registrant}/{number}"


def audit_anchor_key(provider: str, log: str) -> str:
    """Key of an `AuditAnchorRecord`; `log` names the log, e.g. the HSM id."""
    return f"audit-anchor/{provider}/{log}"


def trust_domain_index_key(trust_domain: str) -> str:
    """Key of the `IndexRecord` naming who holds a trust domain."""
    return f"index/trust-domain/{trust_domain}"


def parent_domain_index_key(domain: str) -> str:
    """Key of the `IndexRecord` that says some trust domain lies below `domain`."""
    return f"index/parent-domain/{domain}"


def parent_domains(domain: str) -> tuple[str, ...]:
    """Every domain above `domain`: of a.b.c they are b.c and c."""
    labels = domain.split(".")
    return tuple(".".join(labels[index:]) for index in range(1, len(labels)))


def used_key_index_key(registrant: str, key_digest_hex: str) -> str:
    """Key of the `IndexRecord` that says which record of this registrant a public key belongs to, or belonged, for good."""
    return f"index/key/{registrant}/{key_digest_hex}"


def open_proposals_index_key(authority: str) -> str:
    """Key of the `IndexRecord` of proposals this authority opened that may still be open."""
    return f"index/open-proposals/{authority}"


def chip_index_key(chip_digest_hex: str) -> str:
    """Key of the `IndexRecord` naming every platform record of one chip."""
    return f"index/chip/{chip_digest_hex}"
