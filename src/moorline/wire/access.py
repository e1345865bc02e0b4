"""What the HSMs of both parties say about one connection of a device (PROTOCOLS.md 7; docs/spec/access-statement.md). Pure.

    device   -> its home HSM   POST /v1/access              AccessQuestion
    home HSM -> device         COSE_Sign1 of AccessStatement, side `home`
    device   -> function       Status                       with the home's statement
    function -> its broker     call "device.authorise"      with the home's statement
    its HSM  -> function       COSE_Sign1 of AccessStatement, side `function`, which answers the home's
    function -> device         Status                       with its HSM's statement
    device   -> its home HSM   POST /v1/access/answers      AccessAnswer: the function's HSM said this

A statement is a yes or a no. Both are signed by the HSM key that the ledger has for the side that speaks, and both are about
one connection: `binding` is keying material that TLS exports to the two ends of it and to nobody else.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, Final

from moorline.digest import Digest256, tagged_hash
from moorline.wire import cose, keys, schema
from moorline.wire.schema import Bytes32, Size

PURPOSE: Final = "access-statement"
EXPORTER_LABEL: Final = "EXPORTER-moorline-device"
PROFILE_TLS: Final = "tls"
"""The profile with forward secrecy, as contracts name it; the other one is wire.nopfs.PROFILE."""
STATEMENT_CAP: Final = 8192
RULE_CAP: Final = 1024
Name = Annotated[str, Size(at_most=63)]
Spiffe = Annotated[str, Size(at_most=512)]
SignedStatement = Annotated[bytes, Size(at_most=STATEMENT_CAP)]
"""COSE_Sign1 of an `AccessStatement`, purpose `access-statement`."""


class Side(StrEnum):
    """Whose HSM speaks."""

    HOME = "home"
    FUNCTION = "function"


@dataclass(frozen=True, slots=True, kw_only=True)
class Connection:
    """One connection: who with whom, by which contract, and what TLS made of it. `device` and `function` are SPIFFE IDs.

    `post_quantum`: whether the key agreement was a hybrid with ML-KEM. `binding`: 32 bytes under EXPORTER_LABEL.
    """

    device: Spiffe
    device_provider: Name
    function: Spiffe
    function_provider: Name
    service: Name
    contract: Name
    profile: Name
    post_quantum: bool
    binding: Bytes32


@dataclass(frozen=True, slots=True, kw_only=True)
class AccessStatement:
    """The decision of one side. `rule` says which policies of the contract decided, or what of the ledger refused.

    `answers` is `statement_digest` of the home's statement, empty in the home's own. Times are by the signer's clock.
    """

    ledger_id: Bytes32
    side: Side
    provider: Name
    hsm: Name
    connection: Connection
    allowed: bool
    rule: Annotated[str, Size(at_most=RULE_CAP)]
    issued: int
    not_after: int
    answers: Annotated[bytes, Size(at_most=32)]


@dataclass(frozen=True, slots=True, kw_only=True)
class AccessQuestion:
    """Body of `POST /v1/access`: the home HSM of a device is asked about a connection that is open, and not used yet."""

    connection: Connection


@dataclass(frozen=True, slots=True, kw_only=True)
class AccessAnswer:
    """Body of `POST /v1/access/answers`: both statements about a connection, for the home HSM's log."""

    home: SignedStatement
    function: SignedStatement


def sign_statement(statement: AccessStatement, signer: keys.Signer) -> bytes:
    """A statement as COSE_Sign1 by the HSM key."""
    return cose.sign(PURPOSE, schema.encode(statement), signer)


def parse_statement(data: bytes) -> AccessStatement:
    """What a statement claims, to learn whose key it wants. Untrusted. Raises only Malformed."""
    return schema.decode(AccessStatement, cose.parse(PURPOSE, data, max_bytes=STATEMENT_CAP).payload)


def verify_statement(data: bytes, key: keys.PublicKey) -> AccessStatement:
    """A statement signed by `key`. Raises Malformed and NotAuthentic (`cose.*`, `signature.*`).

    It does not establish that the ledger has this key for the side that speaks, that the statement is fresh, or what it is
    about: `ledger.access` does.
    """
    return schema.decode(AccessStatement, cose.verify(cose.parse(PURPOSE, data, max_bytes=STATEMENT_CAP), key))


def statement_digest(data: bytes) -> Digest256:
    """Names a statement, exactly as signed."""
    return tagged_hash("access-statement", data)
