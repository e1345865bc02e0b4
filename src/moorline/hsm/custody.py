"""Secrets that no single person has: any `quorum` of the named custodians opens them, fewer learn nothing.

A secret is locked once for each subset of `quorum` custodians, under a key derived from that subset's shares (a monotone
formula over HPKE, HKDF and AES-GCM: Benaloh and Leichter 1988). Each share is 32 random bytes, sealed to its custodian's
key and known by its digest, so that a forged share is told from a wrong one and its bringer is named. Why not Shamir: ADR
0012.

1. Every share must be of this secret, of a named custodian, brought once, and have the digest that stands in the record.
2. There must be a quorum of them. The lock of the first such subset is opened.

Randomness is an argument. Nothing here touches a file or a token.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import x25519
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hpke import AEAD, KDF, KEM, Suite
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from moorline.digest import same, tagged, tagged_hash
from moorline.errors import Conflict, Malformed, NotAuthentic, Refused
from moorline.nfv import parse_name
from moorline.wire import keys, schema
from moorline.wire.schema import Bytes32, Size

MOST_CUSTODIANS: Final = 10
"""C(10, 5) = 252 locks at most."""
_SUITE: Final = Suite(KEM.X25519, KDF.HKDF_SHA256, AEAD.AES_256_GCM)
_NONCE: Final = bytes(12)  # every lock has a key of its own, used once
_SHARE: Final = 32
_ID: Final = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Custodian:
    """A person: name, key that signs approvals (DER), X25519 key that shares are sealed to (raw)."""

    name: Annotated[str, Size(at_most=63)]
    signing_public: Annotated[bytes, Size(at_most=512)]
    sealing_public: Bytes32


@dataclass(frozen=True, slots=True, kw_only=True)
class Circle:
    """The custodians of an HSM, and how many of them make a quorum."""

    quorum: int
    custodians: tuple[Custodian, ...]

    def require_sane(self) -> None:
        """Raises Malformed("custody.circle") unless 2 <= quorum <= custodians <= 10, all named and keyed once."""
        names = {parse_name(each.name, "custodian") for each in self.custodians}
        signing = {each.signing_public for each in self.custodians}
        sealing = {each.sealing_public for each in self.custodians}
        count = len(self.custodians)
        once = len(names) == len(signing) == len(sealing) == count
        if not once or not 2 <= self.quorum <= count <= MOST_CUSTODIANS:
            raise Malformed(
                "custody.circle",
                "custodians are named once, each with keys of their own, and no single one is enough",
                expected=f"2 <= quorum <= custodians <= {MOST_CUSTODIANS}",
                got=f"quorum {self.quorum} of {count}",
                remedy="give each person's custodian.cbor once, and a quorum that they can reach",
            )

    def find(self, name: str) -> tuple[int, Custodian]:
        """Place and keys of a custodian. Raises Refused("custody.stranger")."""
        for place, each in enumerate(self.custodians):
            if each.name == name:
                return place, each
        raise Refused(
            "custody.stranger",
            "this person is no custodian here",
            expected=", ".join(each.name for each in self.custodians),
            got=name,
            remedy="bring a custodian of this token's own circle",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Lock:
    """The secret under the shares of the custodians at these places."""

    places: tuple[int, ...]
    sealed: Annotated[bytes, Size(at_most=512)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Locked:
    """A secret in the custody of a circle. `shares` and `digests` are in the circle's order."""

    id: Annotated[bytes, Size(_ID)]
    purpose: Annotated[str, Size(at_most=32)]
    circle: Circle
    shares: tuple[Annotated[bytes, Size(at_most=256)], ...]
    digests: tuple[Bytes32, ...]
    locks: tuple[Lock, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """One custodian's part of one locked secret: a secret itself, good for this one only."""

    id: Annotated[bytes, Size(_ID)]
    custodian: Annotated[str, Size(at_most=63)]
    value: Bytes32

    def __repr__(self) -> str:
        return f"Share(id={self.id.hex()}, custodian={self.custodian})"


def lock(secret: bytes, circle: Circle, *, purpose: str, random: Callable[[int], bytes]) -> Locked:
    """Put a secret into the custody of a circle. `random` gives that many random bytes."""
    circle.require_sane()
    identifier = random(_ID)
    values = [random(_SHARE) for _ in circle.custodians]
    locks = tuple(
        Lock(
            places=places,
            sealed=AESGCM(_lock_key(identifier, purpose, places, [values[place] for place in places])).encrypt(
                _NONCE, secret, None
            ),
        )
        for places in itertools.combinations(range(len(values)), circle.quorum)
    )
    return Locked(
        id=identifier,
        purpose=purpose,
        circle=circle,
        shares=tuple(
            _SUITE.encrypt(
                value,
                x25519.X25519PublicKey.from_public_bytes(each.sealing_public),
                _share_info(identifier, purpose, each.name),
            )
            for each, value in zip(circle.custodians, values, strict=True)
        ),
        digests=tuple(
            _share_digest(identifier, each.name, value) for each, value in zip(circle.custodians, values, strict=True)
        ),
        locks=locks,
    )


def take_share(locked: Locked, name: str, key: x25519.X25519PrivateKey) -> Share:
    """A custodian opens the own share. Raises Refused("custody.stranger") or NotAuthentic("custody.other_key")."""
    require_whole(locked)
    place, _ = locked.circle.find(name)
    try:
        value = _SUITE.decrypt(locked.shares[place], key, _share_info(locked.id, locked.purpose, name))
    except Exception as error:  # the library raises InvalidTag and ValueError on what is not for this key
        raise NotAuthentic(
            "custody.other_key",
            "this key does not open the share of this custodian",
            expected=name,
            got=type(error).__name__,
            remedy="use the custodian's own directory, and the file that belongs to this token",
        ) from None
    share = Share(id=locked.id, custodian=name, value=value)
    _require_genuine(locked, share)
    return share


def unlock(locked: Locked, shares: Sequence[Share]) -> bytes:
    """The secret, from a quorum of shares. Raises Refused, Conflict or NotAuthentic (`custody.*`)."""
    require_whole(locked)
    brought: dict[int, bytes] = {}
    for share in shares:
        if share.id != locked.id:
            raise Refused(
                "custody.other_secret",
                "a share belongs to another secret",
                expected=locked.id,
                got=f"{share.custodian}: {share.id.hex()}",
                remedy="take shares from this very file: moor hsm backup share",
            )
        place, _ = locked.circle.find(share.custodian)
        if place in brought:
            raise Conflict(
                "custody.share_twice",
                "one custodian counts once",
                got=share.custodian,
                remedy="bring the share of another custodian",
            )
        _require_genuine(locked, share)
        brought[place] = share.value
    if len(brought) < locked.circle.quorum:
        raise Refused(
            "custody.too_few",
            "there are not enough shares",
            expected=f"{locked.circle.quorum} of {', '.join(each.name for each in locked.circle.custodians)}",
            got=len(brought),
            remedy="another custodian: moor hsm backup share FILE --custodian DIR --output SHARE, then give its --share too",
        )
    places = tuple(sorted(brought))[: locked.circle.quorum]
    sealed = next(each.sealed for each in locked.locks if each.places == places)
    key = _lock_key(locked.id, locked.purpose, places, [brought[place] for place in places])
    try:
        return AESGCM(key).decrypt(_NONCE, sealed, None)
    except InvalidTag:
        raise NotAuthentic(
            "custody.lock_damaged",
            "genuine shares do not open this lock: the file was changed",
            remedy="take another copy of the file, or bring another quorum",
        ) from None


def require_whole(locked: Locked) -> None:
    """Raises Malformed (`custody.circle`, `custody.incomplete`) unless every quorum has its lock, once, in order."""
    locked.circle.require_sane()
    count, quorum = len(locked.circle.custodians), locked.circle.quorum
    wanted = itertools.combinations(range(count), quorum)
    whole = len(locked.locks) == math.comb(count, quorum) and all(
        each.places == places for each, places in zip(locked.locks, wanted, strict=True)
    )
    if not whole or len(locked.shares) != count or len(locked.digests) != count:
        raise Malformed(
            "custody.incomplete",
            "the file has not one lock for every quorum",
            expected=f"{math.comb(count, quorum)} locks, {count} shares",
            got=f"{len(locked.locks)} locks, {len(locked.shares)} shares",
        )


def parse_share(data: bytes) -> Share:
    """A share as it stands in a file. Raises Malformed."""
    return schema.decode(Share, data, max_bytes=4096)


def public_of(name: str, signing: keys.PublicKey, sealing: x25519.X25519PublicKey) -> Custodian:
    """A custodian's public half."""
    raw = sealing.public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw)
    return Custodian(name=parse_name(name, "custodian"), signing_public=keys.public_bytes(signing), sealing_public=raw)


def _require_genuine(locked: Locked, share: Share) -> None:
    place, _ = locked.circle.find(share.custodian)
    if not same(locked.digests[place], _share_digest(locked.id, share.custodian, share.value)):
        raise NotAuthentic(
            "custody.share_forged",
            "this is not the share that was given to this custodian",
            got=share.custodian,
            remedy="have the custodian open the share again: moor hsm backup share",
        )


def _share_digest(identifier: bytes, name: str, value: bytes) -> bytes:
    return tagged_hash("custody-share", identifier, name.encode("ascii"), value)


def _share_info(identifier: bytes, purpose: str, name: str) -> bytes:
    return tagged("custody-seal", identifier, purpose.encode("ascii"), name.encode("ascii"))


def _lock_key(identifier: bytes, purpose: str, places: tuple[int, ...], values: list[bytes]) -> bytes:
    info = tagged("custody-lock", identifier, purpose.encode("ascii"), bytes(places))
    return HKDF(algorithm=hashes.SHA256(), length=32, salt=identifier, info=info).derive(b"".join(values))
