"""Launch fields, commitment and one-time token (PROTOCOLS.md 3; docs/spec/launch-token.md).

commitment = H("moorline/launch/v1" | CBOR(launch fields))
token      = HMAC-SHA-256(launch key, commitment)
proof      = HMAC-SHA-256(token, H(challenge))          the token itself never travels to the broker
"""

from __future__ import annotations

import hmac
import re
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache
from typing import Annotated, Final

from moorline.digest import Digest256, tagged_hash
from moorline.errors import Malformed
from moorline.wire import schema
from moorline.wire.schema import Bytes32, Bytes48, Size

_GENERATION_ENDING: Final = re.compile(r"-g[0-9]+$")


class ChannelProfile(StrEnum):
    """How the attested session is carried (PROTOCOLS.md 4)."""

    TLS = "tls"
    HPKE_ONLY = "hpke-only"


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchFields:
    """Everything a launch is bound to. All of it is hashed into the commitment; nothing in it is secret.

    `measurement` is the expected launch digest (48 bytes, SNP). `launcher` is H(the launcher's session signing key).
    `chip` is the chip identity of the host's enclave platform. `not_after` is seconds since the epoch.
    """

    ledger_id: Bytes32
    provider: str
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
    launcher: Bytes32
    epoch: int
    sequence: int
    not_after: int


def encode_fields(fields: LaunchFields) -> bytes:
    """Deterministic CBOR of the fields, the exact bytes that are hashed."""
    return schema.encode(fields)


def parse_fields(data: bytes) -> LaunchFields:
    """Launch fields from their encoding; untrusted until the token over them was verified. Raises Malformed."""
    return schema.decode(LaunchFields, data, max_bytes=4096)


@lru_cache(maxsize=64)  # of one launch it is needed several times in a row
def commitment(fields: LaunchFields) -> Digest256:
    """What the evidence carries (SNP HOST_DATA); 32 bytes."""
    return tagged_hash("launch", encode_fields(fields))


def token(launch_key: bytes, fields: LaunchFields) -> bytes:
    """The one-time launch token, as a launcher derives it; 32 bytes, secret from everybody but host and function."""
    return hmac.digest(launch_key, commitment(fields), "sha256")


def token_proof(launch_token: bytes, challenge_digest: bytes) -> bytes:
    """What a function shows instead of its token, for one challenge; 32 bytes."""
    return hmac.digest(launch_token, challenge_digest, "sha256")


def identity_name(instance: str, generation: int) -> str:
    """The opaque instance id in SPIFFE ID and revocation: one generation's own, so that revoking it spares the next.

    Generation 1 is called as its instance, later ones `<instance>-g<generation>`; no instance may be called like that
    (`require_instance_name`), so two generations never share a name.
    """
    return instance if generation == 1 else f"{instance}-g{generation}"


def require_instance_name(instance: str) -> None:
    """Raises Malformed("launch.instance_name") for a name that could be a generation of another instance."""
    if _GENERATION_ENDING.search(instance) is not None:
        raise Malformed(
            "launch.instance_name",
            "an instance is not called like a generation of another",
            expected="a name that does not end in -g<number>",
            got=instance,
            remedy="choose another name",
        )
