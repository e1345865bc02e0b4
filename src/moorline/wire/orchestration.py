"""What an orchestrator says to a launcher enclave and to a host agent (PROTOCOLS.md 3; docs/spec/launch-token.md).

Orchestrator and launcher exchange frames (wire.frames): `LaunchRequest` one way, `LaunchReply` back. The intent is a
COSE_Sign1 (purpose `launch-intent`) by a key that the ledger lists for the orchestrator; the grant is a COSE_Sign1 (purpose
`launch-grant`) by the launcher's session signing key, with its certificate chain. The relay between the two belongs to an
untrusted host: it can drop messages, and it learns everything but the token, which is sealed to the intent's reply key.

An order goes to the host agent over mutual TLS. The host is assumed to know everything in it, the token included.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Final

from cryptography.hazmat.primitives import hpke
from cryptography.hazmat.primitives.asymmetric import x25519

from moorline.digest import Digest256, tagged, tagged_hash
from moorline.errors import NotAuthentic
from moorline.wire.launch import ChannelProfile
from moorline.wire.schema import Bytes32, Bytes48, Size

INTENT_PURPOSE: Final = "launch-intent"
GRANT_PURPOSE: Final = "launch-grant"
MAX_PACKAGE_BYTES: Final = 16 << 20
MAX_ORDER_BYTES: Final = MAX_PACKAGE_BYTES + (1 << 20)
LAUNCH_FRAME_CAP: Final = 256 * 1024

_SUITE: Final = hpke.Suite(hpke.KEM.X25519, hpke.KDF.HKDF_SHA256, hpke.AEAD.AES_256_GCM)


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchIntent:
    """What an orchestrator wants started, and where: the launch fields without those that only the launcher can fill in.

    `reply_key` is a raw X25519 key made for this intent; the token comes back sealed to it.
    """

    ledger_id: Bytes32
    provider: str
    orchestrator: str
    tenant: str
    service: str
    package_digest: Bytes32
    configuration_digest: Bytes32
    measurement: Bytes48
    instance: str
    generation: int
    host: str
    chip: Annotated[bytes, Size(at_most=64)]
    hsm: str
    profile: ChannelProfile
    not_after: int
    reply_key: Bytes32


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchRequest:
    """A signed intent and a ledger proof bundle of the records that make it permitted."""

    intent: Annotated[bytes, Size(at_most=8192)]
    bundle: Annotated[bytes, Size(at_most=LAUNCH_FRAME_CAP - 16384)]


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchGrant:
    """The launch fields exactly as hashed into the commitment, and the token sealed to the intent's reply key."""

    intent_digest: Bytes32
    launch_fields: Annotated[bytes, Size(at_most=4096)]
    sealed_token: Annotated[bytes, Size(at_most=256)]


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchReply:
    """Either a signed grant, or a problem (errors.as_problem, CBOR)."""

    grant: Annotated[bytes, Size(at_most=LAUNCH_FRAME_CAP - 16384)] | None
    problem: Annotated[bytes, Size(at_most=4096)] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class GuestOrder:
    """Start this guest. `launch` is the content of launch.cbor; `relays` maps a name to the one address it reaches.

    `package` and `configuration` are empty for a guest that has none. With `publish` the host agent opens a TCP port and
    relays it to the guest's inbound socket.
    """

    instance: str
    entry: str
    host_data: Bytes32
    launch: Annotated[bytes, Size(at_most=128 * 1024)]
    package: Annotated[bytes, Size(at_most=MAX_PACKAGE_BYTES)]
    configuration: Annotated[bytes, Size(at_most=128 * 1024)]
    memory_mib: int
    pids: int
    relays: dict[str, str]
    publish: bool


def intent_digest(signed_intent: bytes) -> Digest256:
    """The digest of an intent, over its COSE_Sign1 exactly as sent; names the intent in its grant."""
    return tagged_hash("launch-intent", signed_intent)


def seal_token(token: bytes, reply_key: bytes, signed_intent: bytes) -> bytes:
    """The token as it travels in a grant: HPKE base mode (RFC 9180) to the reply key, bound to the intent by `info`."""
    public = x25519.X25519PublicKey.from_public_bytes(reply_key)
    return _SUITE.encrypt(token, public, _info(signed_intent))


def open_token(sealed: bytes, private: x25519.X25519PrivateKey, signed_intent: bytes) -> bytes:
    """The token from a grant. Raises NotAuthentic("launch.token_sealed") unless it was sealed for this intent."""
    try:
        return _SUITE.decrypt(sealed, private, _info(signed_intent))
    except Exception as error:  # the library raises InvalidTag, ValueError and others, all meaning the same
        raise NotAuthentic(
            "launch.token_sealed", "the token was not sealed for this intent", got=type(error).__name__
        ) from None


def _info(signed_intent: bytes) -> bytes:
    return tagged("launch-grant-token", intent_digest(signed_intent))
