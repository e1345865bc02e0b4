"""What needs the security officer of a token: keys leave it only under a wrapping key that the officer marked as trusted.

A recoverable key is CKA_EXTRACTABLE and CKA_WRAP_WITH_TRUSTED (PKCS#11 3.0, 4.9): C_WrapKey takes it under a key with
CKA_TRUSTED only, and only the officer can set that. So who has the user's PIN, which the broker's host needs, cannot take
such a key out; who has the officer's too can, and that PIN exists only in shares (hsm.custody).

1. Nobody else has the token open: officer and user exclude one another (PKCS#11 3.0, 5.6.8).
2. The officer logs in and makes the wrapping key, a trusted session object that dies with this process.
3. The officer logs out, the user logs in, and each key is wrapped (RFC 5649) or unwrapped.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Final

from pkcs11 import Attribute, KeyType, Mechanism, MechanismFlag, ObjectClass
from pkcs11.constants import DEFAULT
from pkcs11.exceptions import PinIncorrect, PKCS11Error

from moorline.errors import Misconfigured, NotAuthentic, Refused, Unavailable
from moorline.hsm.token.location import TokenLocation
from moorline.hsm.token.module import Module

_LABEL: Final = "backup-wrapping"
_ABSENT: Final = dict.fromkeys(
    (
        Attribute.ENCRYPT,
        Attribute.DECRYPT,
        Attribute.WRAP,
        Attribute.UNWRAP,
        Attribute.SIGN,
        Attribute.VERIFY,
        Attribute.DERIVE,
    ),
    DEFAULT,
)
_KEPT: Final = {
    Attribute.SENSITIVE: True,
    Attribute.EXTRACTABLE: True,
    Attribute.WRAP_WITH_TRUSTED: True,
    Attribute.PRIVATE: True,
}


class Wrapping:
    """An open token with a wrapping key in it, for as long as the context lasts."""

    def __init__(self, session: Any, key: Any) -> None:  # noqa: ANN401 - python-pkcs11 is untyped here
        self._session, self._key = session, key

    def wrap(self, kind: str, label: str) -> bytes:
        """A recoverable key under the wrapping key (AES key wrap with padding). Raises Refused("backup.not_recoverable")."""
        classes = {"private": ObjectClass.PRIVATE_KEY, "secret": ObjectClass.SECRET_KEY}
        found = list(self._session.get_objects({Attribute.CLASS: classes[kind], Attribute.LABEL: label}))
        if len(found) != 1:
            raise Misconfigured(
                "token.key_missing", "the token has not exactly one such key", expected=label, got=len(found)
            )
        try:
            return bytes(self._key.wrap_key(found[0], mechanism=Mechanism.AES_KEY_WRAP_PAD))
        except PKCS11Error as error:
            raise Refused(
                "backup.not_recoverable",
                "the token does not let this key out",
                expected="a key made with custodians (moor hsm init --custodian)",
                got=f"{label}: {type(error).__name__}",
                remedy="it cannot be backed up by design; make and register a new one when the token is lost",
            ) from None

    def unwrap_private(self, label: str, wrapped: bytes, point: bytes, *, derive: bool) -> None:
        """Put a P-256 private key into the token, recoverable as before, with its public half beside it."""
        use = {Attribute.DERIVE: True} if derive else {Attribute.SIGN: True}
        self._unwrap(ObjectClass.PRIVATE_KEY, KeyType.EC, label, wrapped, {**_ABSENT, **use, **_KEPT})
        from pkcs11.util.ec import encode_named_curve_parameters

        public_use = {} if derive else {Attribute.VERIFY: True}
        self._session.create_object(
            {
                Attribute.CLASS: ObjectClass.PUBLIC_KEY,
                Attribute.KEY_TYPE: KeyType.EC,
                Attribute.TOKEN: True,
                Attribute.LABEL: label,
                Attribute.ID: label.encode("utf-8"),
                Attribute.EC_PARAMS: encode_named_curve_parameters("secp256r1"),
                Attribute.EC_POINT: bytes((4, len(point))) + point,
                **public_use,
            }
        )

    def unwrap_secret(self, label: str, wrapped: bytes) -> None:
        """Put an AES key for sealing into the token, recoverable as before."""
        uses = {Attribute.ENCRYPT: True, Attribute.DECRYPT: True}
        self._unwrap(ObjectClass.SECRET_KEY, KeyType.AES, label, wrapped, {**_ABSENT, **uses, **_KEPT})

    def _unwrap(
        self, kind: ObjectClass, key_type: KeyType, label: str, wrapped: bytes, template: dict[Attribute, Any]
    ) -> None:
        try:
            self._key.unwrap_key(
                kind,
                key_type,
                wrapped,
                id=label.encode("utf-8"),
                label=label,
                mechanism=Mechanism.AES_KEY_WRAP_PAD,
                store=True,
                capabilities=MechanismFlag(0),
                template=template,
            )
        except PKCS11Error as error:
            raise NotAuthentic(
                "backup.key_damaged", "a wrapped key does not unwrap", expected=label, got=type(error).__name__
            ) from None


@contextlib.contextmanager
def trusted_wrapping(location: TokenLocation, officer_pin: str, key: bytes) -> Iterator[Wrapping]:
    """A token with `key` (32 bytes) as a trusted wrapping key; nobody else may have it open in this process.

    Raises Refused("backup.officer_refused") for a wrong officer's PIN, which is tried once.
    """
    module = Module.enter(location)
    try:
        if module.users > 1:
            raise Unavailable(
                "backup.token_in_use", "the token is open in this process", remedy="stop the broker for the time of a backup"
            )
        with module.in_use(), _sessions(module, location, officer_pin, key) as wrapping:
            yield wrapping
    finally:
        module.leave()


@contextlib.contextmanager
def _sessions(module: Module, location: TokenLocation, officer_pin: str, key: bytes) -> Iterator[Wrapping]:
    token = module.find(location)
    try:
        officer = token.open(rw=True, so_pin=officer_pin)
    except PinIncorrect:
        raise Refused(
            "backup.officer_refused",
            "the token refuses the officer's PIN that the shares give",
            remedy="the shares belong to another token, or the token was initialised anew",
        ) from None
    try:
        officer.create_object(
            {
                Attribute.CLASS: ObjectClass.SECRET_KEY,
                Attribute.KEY_TYPE: KeyType.AES,
                Attribute.TOKEN: False,
                Attribute.PRIVATE: False,  # the officer makes no private objects; it is still sensitive, and in memory only
                Attribute.SENSITIVE: True,
                Attribute.EXTRACTABLE: False,
                Attribute.TRUSTED: True,
                Attribute.WRAP: True,
                Attribute.UNWRAP: True,
                Attribute.LABEL: _LABEL,
                Attribute.VALUE: key,
            }
        )
        module.native.logout(int(officer.handle))
        user = token.open(rw=True, user_pin=location.pin())
        wanted = {Attribute.CLASS: ObjectClass.SECRET_KEY, Attribute.LABEL: _LABEL, Attribute.TOKEN: False}
        (made,) = list(user.get_objects(wanted))
        yield Wrapping(user, made)
    except PKCS11Error as error:
        raise Unavailable("token.failed", "the token could not do it", got=type(error).__name__) from error
    finally:
        module.native.finalize()  # both sessions, both logins and the wrapping key end here, whatever state they are in
        module.native.initialize_for_threads()
        module.incarnation += 1
