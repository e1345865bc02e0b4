"""Messages and key inputs of the device channel without forward secrecy (PROTOCOLS.md 7; docs/spec/no-pfs-channel.md). Pure.

    device   -> function       NoPfsHello     who it is, its home HSM, the contract, 32 fresh bytes
    function -> its broker     call "device.key"         the function's two keys, claimed for it alone
    function -> device         NoPfsOffer     provider, HSM, service, pair epoch, 32 fresh bytes
    device   -> its home HSM   POST /v1/device-keys      the same two keys, HPKE-sealed to a fresh KEM key
    device   -> function       NoPfsRecord    AEAD under the one key, counters from 0
    function -> device         NoPfsRecord    AEAD under the other key, counters from 0

K (direction) = HMAC(pair key, ledger id | providers | HSMs | pair epoch | device | service | both nonces | direction).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, Final

from moorline.digest import Digest256, tagged, tagged_hash
from moorline.wire.schema import Bytes32, Size

PROFILE: Final = "no-pfs"
"""The name under which contract and service must allow this profile."""
VERSION: Final = 1
NONCE: Final = 32
Name = Annotated[str, Size(at_most=63)]
Spiffe = Annotated[str, Size(at_most=512)]


class Direction(StrEnum):
    """Who sends under a key."""

    TO_FUNCTION = "to-function"
    TO_DEVICE = "to-device"


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyContext:
    """Everything a key is bound to, besides its direction. `device` is a SPIFFE ID."""

    ledger_id: bytes
    device_provider: str
    device_hsm: str
    function_provider: str
    function_hsm: str
    pair_epoch: int
    device: str
    service: str
    device_nonce: bytes
    function_nonce: bytes

    def message(self, direction: Direction) -> bytes:
        """What the pair key MACs; the result is K of this direction."""
        return tagged("device-key", *self._fields(), direction.value.encode("ascii"))

    def key_id(self) -> Digest256:
        """Names both keys; not secret."""
        return tagged_hash("device-key-id", *self._fields())

    def _fields(self) -> tuple[bytes, ...]:
        texts = (self.device_provider, self.function_provider, self.device_hsm, self.function_hsm)
        return (
            self.ledger_id,
            *(text.encode("utf-8") for text in texts),
            self.pair_epoch.to_bytes(8, "big"),
            self.device.encode("utf-8"),
            self.service.encode("utf-8"),
            self.device_nonce,
            self.function_nonce,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class NoPfsHello:
    """The device's first frame. Nothing in it is authentic before the first record."""

    version: int
    device: Spiffe
    home_provider: Name
    home_hsm: Name
    contract: Name
    nonce: Bytes32


@dataclass(frozen=True, slots=True, kw_only=True)
class NoPfsOffer:
    """The function's answer. `not_after` is when both keys end, by the clocks of both HSMs."""

    provider: Name
    hsm: Name
    service: Name
    pair_epoch: int
    nonce: Bytes32
    not_after: int


@dataclass(frozen=True, slots=True, kw_only=True)
class NoPfsRecord:
    """One message, sealed. `counter` rises by one from 0 in each direction."""

    counter: int
    sealed: Annotated[bytes, Size(at_most=(1 << 20) + 64)]


@dataclass(frozen=True, slots=True, kw_only=True)
class FunctionKeyCall:
    """operation "device.key" of a function's session with its broker."""

    service: Name
    device: Spiffe
    home_provider: Name
    home_hsm: Name
    contract: Name
    device_nonce: Bytes32
    function_nonce: Bytes32


@dataclass(frozen=True, slots=True, kw_only=True)
class FunctionKeyReply:
    """The function's keys. `count` counters from 0 are good in each direction; `bundle` proves the contract."""

    pair_epoch: int
    key_id: Bytes32
    to_function: Bytes32
    to_device: Bytes32
    count: int
    not_after: int
    bundle: Annotated[bytes, Size(at_most=65536)]


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceKeyRequest:
    """Body of `POST /v1/device-keys`. `kem_public` is a fresh MLKEM768_X25519 public key of the device."""

    function_provider: Name
    function_hsm: Name
    service: Name
    contract: Name
    pair_epoch: int
    device_nonce: Bytes32
    function_nonce: Bytes32
    kem_public: Annotated[bytes, Size(at_most=2048)]


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceKeys:
    """What the home HSM seals for the device."""

    key_id: Bytes32
    to_function: Bytes32
    to_device: Bytes32
    count: int
    not_after: int


def sealing_info(request: bytes) -> bytes:
    """HPKE's info: the request exactly as sent, so an answer opens for no other one."""
    return tagged("device-key-sealed", request)
