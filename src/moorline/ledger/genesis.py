"""The genesis: everything a ledger starts from, and its identity.

`ledger_id = H("moorline/genesis/v1" | CBOR(genesis))` stands in every checkpoint and every transaction, so nothing of the
genesis, `simulated_allowed` least of all, can be changed without becoming another ledger.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Final

from moorline import nfv
from moorline.clock import Instant
from moorline.digest import tagged_hash
from moorline.errors import Malformed, MoorlineError
from moorline.ledger import issuance, records, revocation_list
from moorline.ledger.checkpoint import quorum_of
from moorline.ledger.light_client import TRUSTING_PERIOD_S, LedgerTrust
from moorline.ledger.parameters import MAX_MAX_AGE_S, MIN_MAX_AGE_S, PARAMETERS
from moorline.ledger.records import AuthorityRecord, Der, Spki, Status, Text
from moorline.wire import keys, schema
from moorline.wire.schema import Bytes32

VERSION: Final = 2
_VERSIONS: Final = (1, VERSION)
"""A ledger of version 1 numbers no revocations (ADR 0033), so that its blocks give the same states as ever."""
MIN_AUTHORITIES: Final = 2  # admission takes two distinct authorities
MAX_AUTHORITIES: Final = 64
MAX_GENESIS_BYTES: Final = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameters:
    """`max_age_s`: how old a proof may be; an empty block is made at least every third of it. The quorum follows from n."""

    max_age_s: int


@dataclass(frozen=True, slots=True, kw_only=True)
class GenesisAuthority:
    """A founding authority. `address` is host:port of its HTTPS interface."""

    name: str
    certificate: Der
    transaction_key: Spki
    checkpoint_key: Bytes32
    address: Text


@dataclass(frozen=True, slots=True, kw_only=True)
class Genesis:
    """`roots` are the consortium's root certificates, `sequencer` the authority that makes blocks (embedded engine)."""

    version: int
    consortium_domain: str
    time_ms: int
    simulated_allowed: bool
    parameters: Parameters
    roots: tuple[Der, ...]
    authorities: tuple[GenesisAuthority, ...]
    sequencer: str

    def encode(self) -> bytes:
        """Deterministic CBOR, the bytes that `ledger_id` covers."""
        return schema.encode(self)

    @property
    def ledger_id(self) -> bytes:
        """32 bytes."""
        return tagged_hash("genesis", self.encode())

    def trust(self) -> LedgerTrust:
        """What parties of this ledger are provisioned with."""
        return LedgerTrust(
            ledger_id=self.ledger_id,
            authorities={authority.name: authority.checkpoint_key for authority in self.authorities},
            quorum=quorum_of(len(self.authorities)),
            roots=self.roots,
            simulated_allowed=self.simulated_allowed,
            max_age_s=self.parameters.max_age_s,
            known_s=self.time_ms // 1000,
            trusting_period_s=TRUSTING_PERIOD_S,
        )


def parse(data: bytes) -> Genesis:
    """A genesis that makes sense: names and keys distinct, certificates under a root. Raises only Malformed.

    Whether it is the right one is for whoever knows the ledger id to say.
    """
    genesis = schema.decode(Genesis, data, max_bytes=MAX_GENESIS_BYTES)
    if genesis.version not in _VERSIONS:
        raise _wrong("its version is unknown")
    nfv.parse_domain(genesis.consortium_domain, "consortium domain")
    names = [authority.name for authority in genesis.authorities]
    if not MIN_AUTHORITIES <= len(names) <= MAX_AUTHORITIES or names != sorted(set(names)):
        raise _wrong(f"authorities are {MIN_AUTHORITIES} to {MAX_AUTHORITIES}, in order of their distinct names")
    if genesis.sequencer not in names:
        raise _wrong("the sequencer is not an authority")
    if not MIN_MAX_AGE_S <= genesis.parameters.max_age_s <= MAX_MAX_AGE_S:
        raise _wrong(f"max_age_s is {MIN_MAX_AGE_S} to {MAX_MAX_AGE_S}")
    if len({authority.checkpoint_key for authority in genesis.authorities}) != len(names):
        raise _wrong("two authorities share a checkpoint key")
    if len({authority.transaction_key for authority in genesis.authorities}) != len(names):
        raise _wrong("two authorities share a transaction key")
    for authority in genesis.authorities:
        _authority(authority, genesis)
    all_keys = [
        spki
        for one in genesis.authorities
        for spki in issuance.authority_spkis(one.certificate, one.transaction_key, one.checkpoint_key)
    ]
    if len(set(all_keys)) != len(all_keys):
        raise _wrong("a key serves twice")
    return genesis


def initial_records(genesis: Genesis) -> dict[str, bytes]:
    """The state before the first block."""
    state: dict[str, object] = {
        records.authority_key(authority.name): AuthorityRecord(
            name=authority.name,
            status=Status.ACTIVE,
            certificate=authority.certificate,
            transaction_key=authority.transaction_key,
            checkpoint_key=authority.checkpoint_key,
            address=authority.address,
        )
        for authority in genesis.authorities
    }
    state[records.AUTHORITIES_INDEX] = records.IndexRecord(holders=tuple(a.name for a in genesis.authorities))
    state[records.ROOTS_KEY] = records.RootsRecord(roots=genesis.roots)
    if genesis.version >= VERSION:
        state[records.revocations_index_key(records.CONSORTIUM)] = revocation_list.NONE
    values = {name: bounds.initial for name, bounds in PARAMETERS.items()}
    values |= {"max_age_s": genesis.parameters.max_age_s, "simulated_allowed": int(genesis.simulated_allowed)}
    for name, value in values.items():
        state[records.parameter_key(name)] = records.ParameterRecord(name=name, value=value)
    for authority in genesis.authorities:
        key = records.authority_key(authority.name)
        for spki in issuance.authority_spkis(authority.certificate, authority.transaction_key, authority.checkpoint_key):
            digest = hashlib.sha256(spki).hexdigest()
            state[records.used_key_index_key(records.CONSORTIUM, digest)] = records.IndexRecord(holders=(key,))
    # Authorities' own certificates live under the consortium's domain: no provider may hold it, or a part of it.
    taken = records.IndexRecord(holders=(records.CONSORTIUM,))
    state[records.trust_domain_index_key(genesis.consortium_domain)] = taken
    for parent in records.parent_domains(genesis.consortium_domain):
        state[records.parent_domain_index_key(parent)] = taken
    return {key: records.encode(record) for key, record in state.items()}


def _authority(authority: GenesisAuthority, genesis: Genesis) -> None:
    try:
        records.parse_name(authority.name, "authority")
        keys.parse_public(authority.transaction_key)
        issuance.authority(authority.certificate, genesis.roots, Instant(genesis.time_ms // 1000))
    except MoorlineError as error:
        raise _wrong(f"authority {authority.name}: {error}") from None


def _wrong(why: str) -> Malformed:
    return Malformed("ledger.genesis_malformed", f"the genesis makes no sense: {why}")
