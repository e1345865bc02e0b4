"""Recoverable keys of a token in a file that only a quorum of custodians opens, and back into an empty token.

What is in a backup: the keys whose loss would lose something for good, made recoverable when the token was set up with
custodians (ceremony.initialise): HSM identity, issuing CA, verifier, KEM and wrapping keys. What is not: launch keys (an
epoch is opened anew), pair keys (agreed anew with the peer), and every key made without custodians; the file names them.
Counters are in it, and are put far ahead on restore, since how far they went after the backup is not known.

Create, with the broker stopped:
1. A quorum's shares of the officer's PIN (custody.cbor beside the token).
2. A fresh wrapping key, trusted by the officer, wraps each key inside the token; it is put into the custody of the circle.
3. The whole is signed by the HSM identity and written beside its place, flushed, then renamed: a file is whole or absent.

Restore:
1. The signature must be by the HSM identity that the caller names; every quorum must have its lock; a quorum's shares open
   it.
2. A new token is made in a directory that does not have its final name yet; keys are unwrapped, and must do what the public
   keys in the signed file say; counters are set; the officer's new PIN is put into custody.
3. The directory gets its name. A crash before that leaves nothing that could be taken for a token.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Final

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature

from moorline.clock import Instant
from moorline.digest import same
from moorline.errors import Malformed, Misconfigured, NotAuthentic
from moorline.hsm import custody
from moorline.hsm.custody import Circle, Locked, Share
from moorline.hsm.keys import HSM_IDENTITY, KEM, TokenEcKey, point_key
from moorline.hsm.launch_keys import COUNTER
from moorline.hsm.token import LocalToken, TokenLocation, initialise_softhsm, open_token
from moorline.hsm.token.officer import Wrapping, trusted_wrapping
from moorline.hsm.token.port import KeyFacts
from moorline.hsm.token.softhsm import configuration_text, require_label, require_unused
from moorline.storage import whole_files
from moorline.storage.steps import reached
from moorline.wire import cose, keys, schema
from moorline.wire.schema import Size

PURPOSE: Final = "hsm-backup"
CUSTODY_FILE: Final = "custody.cbor"
OFFICER_PURPOSE: Final = "officer-pin"
KEY_PURPOSE: Final = "backup-key"
COUNTER_STRIDE: Final = 1 << 32
"""A restored counter begins at the next multiple of this: ahead of whatever was counted after the backup was made."""
FILE_CAP: Final = 1024 * 1024
_KEY_BYTES: Final = 32
_POINT: Final = 65


@dataclass(frozen=True, slots=True, kw_only=True)
class WrappedKey:
    """A key under the backup's wrapping key (RFC 5649). `kind` is `private` (P-256, PKCS#8 inside) or `secret` (AES-256)."""

    label: Annotated[str, Size(at_most=128)]
    kind: Annotated[str, Size(at_most=16)]
    point: Annotated[bytes, Size(at_most=_POINT)]
    wrapped: Annotated[bytes, Size(at_most=1024)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Counter:
    """A counter as it was."""

    label: Annotated[str, Size(at_most=128)]
    value: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Backup:
    """What the HSM identity signs. `not_included` are keys that are made anew after a loss."""

    token: str
    created: int
    keys: tuple[WrappedKey, ...]
    counters: tuple[Counter, ...]
    not_included: tuple[str, ...]
    key: Locked


def create(
    location: TokenLocation,
    shares: Sequence[Share],
    output: Path,
    *,
    now: Instant,
    identity: keys.PublicKey | None = None,
    random: Callable[[int], bytes] = os.urandom,
) -> Backup:
    """A backup of a token that nobody has open, in a new file. Raises `backup.*`, `custody.*`, `token.*`."""
    if output.exists():
        raise Misconfigured("backup.exists", "there is a file already", got=output, remedy="choose another name")
    kept = load_custody(location)
    pin = custody.unlock(kept, shares).decode("ascii")
    with open_token(location) as token:
        facts = token.inspect()
        counters = tuple(
            Counter(label=label, value=token.counter(label))
            for label in sorted({f.label for f in facts if f.kind == "data"})
        )
        points = {f.label: token.ec_point(f.label) for f in facts if f.kind == "private" and f.trust_needed}
    wanted = [each for each in facts if each.kind in ("private", "secret") and each.trust_needed]
    label = _identity_label(points, identity)
    secret = random(_KEY_BYTES)
    with trusted_wrapping(location, pin, secret) as wrapping:
        wrapped = tuple(_wrapped(wrapping, each, points) for each in wanted)
    reached("hsm.backup.wrapped")
    made = Backup(
        token=location.label or "",
        created=now,
        keys=wrapped,
        counters=counters,
        not_included=tuple(
            sorted({each.label for each in facts if each.kind in ("private", "secret")} - {each.label for each in wanted})
        ),
        key=custody.lock(secret, kept.circle, purpose=KEY_PURPOSE, random=random),
    )
    with open_token(location) as token:
        signed = cose.sign(PURPOSE, schema.encode(made), keys.KeySigner(TokenEcKey(token, label)))
    whole_files.replace(output, signed, mode=whole_files.PRIVATE)
    reached("hsm.backup.written")
    return made


def verify(data: bytes, identity: keys.PublicKey) -> Backup:
    """A backup signed by this HSM identity and whole. Raises Malformed or NotAuthentic.

    It does not establish that the keys inside unwrap: only a quorum can see that, and `restore` does.
    """
    payload = cose.verify(cose.parse(PURPOSE, data, max_bytes=FILE_CAP), identity)
    found = schema.decode(Backup, payload, max_bytes=FILE_CAP)
    custody.require_whole(found.key)
    labels = [each.label for each in found.keys]
    if len(set(labels)) != len(labels):
        raise Malformed("backup.contents", "a backup has each key once", got=", ".join(labels))
    _identity_label({each.label: each.point for each in found.keys if each.kind == "private"}, identity)
    return found


def restore(
    data: bytes,
    identity: keys.PublicKey,
    shares: Sequence[Share],
    directory: Path,
    *,
    random: Callable[[int], bytes] = os.urandom,
) -> TokenLocation:
    """A new SoftHSM token in `directory`, which must not exist, with the keys of a backup. Raises as `create`."""
    found = verify(data, identity)
    secret = custody.unlock(found.key, shares)
    directory = directory.absolute()
    if directory.exists():
        raise Misconfigured(
            "backup.not_empty",
            "a backup is restored to an empty place only",
            got=directory,
            remedy="choose a directory that is not there yet",
        )
    unfinished = directory.with_name(directory.name + ".restoring")
    shutil.rmtree(unfinished, ignore_errors=True)  # of a restore that died
    unfinished.mkdir(mode=0o700, parents=True)
    try:
        location = _restored(found, secret, unfinished, random)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)  # keys whose proof failed are not left lying about
        raise
    (unfinished / "softhsm2.conf").write_text(configuration_text(directory / "tokens"))
    reached("hsm.restore.proven")
    unfinished.rename(directory)
    return replace(location, pin_file=directory / "pin", environment={"SOFTHSM2_CONF": str(directory / "softhsm2.conf")})


def _restored(found: Backup, secret: bytes, unfinished: Path, random: Callable[[int], bytes]) -> TokenLocation:
    """Step 2: a token with the keys of a backup, each proven, and counters far ahead."""
    location, officer = new_token(unfinished, found.token, found.key.circle, random=random)
    reached("hsm.restore.token")
    with trusted_wrapping(location, officer, secret) as wrapping:
        for each in found.keys:
            _unwrap(wrapping, each)
    reached("hsm.restore.keys")
    with open_token(location) as token:
        _prove(token, found)
        # The state counter also where it had not begun: it may have, after the backup.
        for label, value in {COUNTER: 0, **{each.label: each.value for each in found.counters}}.items():
            token.set_counter(label, (value // COUNTER_STRIDE + 1) * COUNTER_STRIDE)
    return location


def new_token(
    directory: Path, label: str, circle: Circle, *, random: Callable[[int], bytes] = os.urandom
) -> tuple[TokenLocation, str]:
    """A new SoftHSM token whose officer's PIN is in custody; the PIN too, for who goes on setting it up."""
    require_label(label)
    require_unused(directory)  # before its custody is replaced: the officer's PIN of a token that works would be lost
    officer = random(16).hex()
    locked = custody.lock(officer.encode("ascii"), circle, purpose=OFFICER_PURPOSE, random=random)
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    # Before the token: a token whose officer's PIN nobody can find again would be one that cannot be backed up.
    whole_files.replace(directory / CUSTODY_FILE, schema.encode(locked), mode=whole_files.PRIVATE)
    return initialise_softhsm(directory, label=label, so_pin=officer), officer


def load_custody(location: TokenLocation) -> Locked:
    """The custody record beside a token. Raises Misconfigured("custody.none") or Malformed."""
    assert location.pin_file is not None
    path = location.pin_file.with_name(CUSTODY_FILE)
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise Misconfigured(
            "custody.none",
            "this token was set up without custodians: its keys do not leave it, by design",
            expected=path,
            remedy="set a token up with custodians: moor hsm init --custodian FILE --custodian FILE --quorum N",
        ) from None
    return schema.decode(Locked, data, max_bytes=FILE_CAP)


def _identity_label(points: dict[str, bytes], identity: keys.PublicKey | None) -> str:
    """The identity key that signs: of these public points the one that is `identity`, or the one of the set-up."""
    for label, point in points.items():
        if label.split("@")[0] != HSM_IDENTITY:
            continue
        if label == HSM_IDENTITY if identity is None else same(_spki(point), keys.public_bytes(identity)):
            return label
    raise NotAuthentic(
        "backup.other_identity",
        "the HSM identity that signs a backup must be among its keys",
        expected=HSM_IDENTITY,
        got=", ".join(points),
        remedy="name the certificate of this HSM's identity",
    )


def _spki(point: bytes) -> bytes:
    return keys.public_bytes(point_key(point))


def _wrapped(wrapping: Wrapping, facts: KeyFacts, points: dict[str, bytes]) -> WrappedKey:
    return WrappedKey(
        label=facts.label,
        kind=facts.kind,
        point=points.get(facts.label, b"") if facts.kind == "private" else b"",
        wrapped=wrapping.wrap(facts.kind, facts.label),
    )


def _unwrap(wrapping: Wrapping, each: WrappedKey) -> None:
    if each.kind == "private":
        wrapping.unwrap_private(each.label, each.wrapped, each.point, derive=each.label.split("@")[0] == KEM)
    elif each.kind == "secret":
        wrapping.unwrap_secret(each.label, each.wrapped)
    else:
        raise Malformed("backup.contents", "a backup holds private and secret keys only", got=each.kind)


def _prove(token: LocalToken, found: Backup) -> None:
    """Each restored key must do what its public half says; raises NotAuthentic("backup.key_damaged")."""
    probe = hashlib.sha256(b"restored").digest()
    for each in found.keys:
        if each.kind == "secret":
            sealed = token.seal(each.label, probe, b"restored")
            token.unseal(each.label, sealed, b"restored")
        elif each.label.split("@")[0] != KEM:
            raw = token.ecdsa(each.label, probe)
            der = encode_dss_signature(int.from_bytes(raw[:32], "big"), int.from_bytes(raw[32:], "big"))
            _verify(each, der, probe)
        else:
            _prove_agreement(token, each)


def _verify(each: WrappedKey, signature: bytes, digest: bytes) -> None:
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric.utils import Prehashed

    try:
        point_key(each.point).verify(signature, digest, ec.ECDSA(Prehashed(hashes.SHA256())))
    except (InvalidSignature, ValueError):
        raise NotAuthentic("backup.key_damaged", "a restored key is not the one stated", expected=each.label) from None


def _prove_agreement(token: LocalToken, each: WrappedKey) -> None:
    import hmac

    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    own, label = ec.generate_private_key(ec.SECP256R1()), f"restore-proof-{time.monotonic_ns()}"
    token.agree(each.label, own.public_key().public_bytes(Encoding.X962, PublicFormat.UncompressedPoint), label)
    try:
        expected = hmac.digest(own.exchange(ec.ECDH(), point_key(each.point)), b"restored", "sha256")
        if not same(token.mac(label, b"restored"), expected):
            raise NotAuthentic("backup.key_damaged", "a restored key is not the one stated", expected=each.label)
    finally:
        token.destroy_secret(label)
