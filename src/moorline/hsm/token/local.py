"""A token whose module is loaded in this process.

Keys made here are sensitive and not extractable; those made `recoverable` are extractable only under a wrapping key that the
security officer marked as trusted (CKA_WRAP_WITH_TRUSTED), which hsm.backup needs a quorum of custodians for. There is no
method that returns a key. Errors of the module become Unavailable("token.failed") without its parameters.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any, Final, Self, TypeVar

from pkcs11 import Attribute, GCMParams, KeyType, Mechanism, MechanismFlag, ObjectClass
from pkcs11.constants import DEFAULT
from pkcs11.exceptions import FunctionNotSupported, MechanismInvalid, PKCS11Error
from pkcs11.mechanisms import KDF
from pkcs11.util.ec import encode_named_curve_parameters

from moorline.errors import Misconfigured, NotAuthentic, Unavailable
from moorline.hsm.token.location import TokenLocation
from moorline.hsm.token.module import Module
from moorline.hsm.token.port import KeyFacts
from moorline.hsm.token.sessions import LANES, Lane, Sessions

T = TypeVar("T")

_GCM_NONCE: Final = 12
_GCM_TAG_BITS: Final = 128
_P256_POINT: Final = 65
_ED25519_POINT: Final = 32
_ED25519_PARAMETERS: Final = bytes.fromhex("06032b6570")
"""The object identifier 1.3.101.112 (RFC 8410), DER."""
_SHARED_BITS: Final = 256
_USES: Final = (
    *(Attribute.SIGN, Attribute.VERIFY, Attribute.ENCRYPT, Attribute.DECRYPT),
    *(Attribute.WRAP, Attribute.UNWRAP, Attribute.DERIVE),
)
_UNSAID: Final = dict.fromkeys(_USES, DEFAULT)
"""Uses that are left out of a template: some modules refuse a use that a class of object does not have, even if it is no."""
_SHOWN: Final = (ObjectClass.PRIVATE_KEY, ObjectClass.PUBLIC_KEY, ObjectClass.SECRET_KEY, ObjectClass.DATA)
_KINDS: Final = {
    ObjectClass.PRIVATE_KEY: "private",
    ObjectClass.PUBLIC_KEY: "public",
    ObjectClass.SECRET_KEY: "secret",
    ObjectClass.DATA: "data",
}


class LocalToken:
    """An open token (port.Token). Thread-safe: each operation borrows one of a few sessions."""

    def __init__(self, location: TokenLocation, module: Module, sessions: Sessions) -> None:
        self.location = location
        self.module = module
        self.sessions = sessions
        self._counting = threading.Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close the sessions. The token can be opened again afterwards."""
        self.sessions.close()

    def require_present(self) -> None:
        """Raises Unavailable("token.gone") if the module does not see the token now."""
        self.sessions.require_present()

    # -- randomness -------------------------------------------------------------------------------------------------

    def random(self, size: int) -> bytes:
        """`size` bytes of the token's generator."""
        return self.sessions.run(lambda lane: bytes(lane.session.generate_random(size * 8)), again=True)

    # -- EC P-256 ---------------------------------------------------------------------------------------------------

    def generate_ec_key(self, label: str, *, derive: bool = False, recoverable: bool = False) -> bytes:
        """Make a P-256 key pair in the token, to sign with or (`derive`) to agree with; the 65-byte public point."""
        public_uses = {Attribute.DERIVE: True} if derive else {Attribute.VERIFY: True}
        private_uses = {Attribute.DERIVE: True} if derive else {Attribute.SIGN: True}

        def generate(lane: Lane) -> bytes:
            _must_be_free(lane, ObjectClass.PRIVATE_KEY, label)
            parameters = lane.session.create_domain_parameters(
                KeyType.EC, {Attribute.EC_PARAMS: encode_named_curve_parameters("secp256r1")}, local=True
            )
            public, _ = parameters.generate_keypair(
                store=True,
                id=label.encode("utf-8"),
                label=label,
                capabilities=MechanismFlag(0),
                mechanism=Mechanism.EC_KEY_PAIR_GEN,
                public_template={**_UNSAID, **({} if derive else public_uses)},
                private_template={**_UNSAID, **private_uses, **_protection(recoverable=recoverable)},
            )
            return _point(public)

        return self._needing("EC key pairs", generate)

    def ec_point(self, label: str) -> bytes:
        """The uncompressed public point (65 bytes) of an EC key in the token."""
        return self.sessions.run(lambda lane: _point(lane.find(ObjectClass.PUBLIC_KEY, label)), again=True)

    def ecdsa(self, label: str, digest: bytes) -> bytes:
        """The signature r | s (64 bytes) over a digest, which the caller made."""
        return self.sessions.run(
            lambda lane: bytes(lane.find(ObjectClass.PRIVATE_KEY, label).sign(digest, mechanism=Mechanism.ECDSA)),
            again=True,
        )

    # -- Ed25519: a validator's key; not of the port, since its signer owns its token itself

    def generate_ed25519_key(self, label: str) -> bytes:
        """Make an Ed25519 key pair in the token, to sign with; the raw public key (32 bytes)."""

        def generate(lane: Lane) -> bytes:
            _must_be_free(lane, ObjectClass.PRIVATE_KEY, label)
            parameters = lane.session.create_domain_parameters(
                KeyType.EC_EDWARDS, {Attribute.EC_PARAMS: _ED25519_PARAMETERS}, local=True
            )
            public, _ = parameters.generate_keypair(
                store=True,
                id=label.encode("utf-8"),
                label=label,
                capabilities=MechanismFlag(0),
                mechanism=Mechanism.EC_EDWARDS_KEY_PAIR_GEN,
                public_template={**_UNSAID, Attribute.VERIFY: True},
                private_template={**_UNSAID, Attribute.SIGN: True, **_protection(recoverable=False)},
            )
            return _edwards_point(public)

        return self._needing("Ed25519 key pairs", generate)

    def ed25519_public(self, label: str) -> bytes:
        """The raw public key (32 bytes) of an Ed25519 key in the token."""
        return self.sessions.run(lambda lane: _edwards_point(lane.find(ObjectClass.PUBLIC_KEY, label)), again=True)

    def ed25519(self, label: str, message: bytes) -> bytes:
        """The signature (64 bytes) over a message."""

        def sign(lane: Lane) -> bytes:
            return bytes(lane.find(ObjectClass.PRIVATE_KEY, label).sign(message, mechanism=Mechanism.EDDSA))

        return self.sessions.run(sign, again=True)

    def agree(self, label: str, peer_point: bytes, into: str) -> None:
        """ECDH with a peer's 65-byte point; the x coordinate becomes the non-extractable HMAC key `into` in the token."""

        def derive(lane: Lane) -> None:
            _must_be_free(lane, ObjectClass.SECRET_KEY, into)
            lane.find(ObjectClass.PRIVATE_KEY, label).derive_key(
                KeyType.GENERIC_SECRET,
                _SHARED_BITS,
                label=into,
                store=True,
                capabilities=MechanismFlag.SIGN | MechanismFlag.VERIFY,
                mechanism=Mechanism.ECDH1_DERIVE,
                mechanism_param=(KDF.NULL, None, peer_point),
                template=_protection(recoverable=False),
            )

        self._needing("ECDH1_DERIVE", derive)

    # -- secrets ----------------------------------------------------------------------------------------------------

    def generate_wrapping_key(self, label: str, *, recoverable: bool = False) -> None:
        """Make an AES-256 key in the token for `seal` and `unseal`."""

        def generate(lane: Lane) -> None:
            _must_be_free(lane, ObjectClass.SECRET_KEY, label)
            lane.session.generate_key(
                KeyType.AES,
                256,
                store=True,
                label=label,
                capabilities=MechanismFlag.ENCRYPT | MechanismFlag.DECRYPT,
                template=_protection(recoverable=recoverable),
            )

        self._needing("AES keys", generate)

    def seal(self, label: str, plaintext: bytes, bound_to: bytes) -> bytes:
        """A nonce, then ciphertext and tag of AES-256-GCM in the token; `bound_to` is authenticated and not contained."""
        nonce = self.random(_GCM_NONCE)

        def encrypt(lane: Lane) -> bytes:
            key = lane.find(ObjectClass.SECRET_KEY, label)
            parameters = GCMParams(nonce, bound_to, _GCM_TAG_BITS)
            return nonce + bytes(key.encrypt(plaintext, mechanism=Mechanism.AES_GCM, mechanism_param=parameters))

        return self.sessions.run(encrypt, again=True)

    def unseal(self, label: str, sealed: bytes, bound_to: bytes) -> bytes:
        """What `seal` was given. Raises NotAuthentic("token.unseal") if any bit of it, or `bound_to`, is another."""

        def decrypt(lane: Lane) -> bytes:
            key = lane.find(ObjectClass.SECRET_KEY, label)
            parameters = GCMParams(sealed[:_GCM_NONCE], bound_to, _GCM_TAG_BITS)
            try:
                plain = key.decrypt(sealed[_GCM_NONCE:], mechanism=Mechanism.AES_GCM, mechanism_param=parameters)
            except PKCS11Error as error:
                self.require_present()  # a token that is away decrypts nothing either, and says so in many ways
                raise NotAuthentic(
                    "token.unseal",
                    "a sealed value does not belong to this token or this place",
                    got=type(error).__name__,
                    remedy="the database was changed, or comes from another HSM",
                ) from None
            return bytes(plain)

        return self.sessions.run(decrypt, again=True)

    def import_mac_key(self, label: str, value: bytes) -> None:
        """Put an HMAC key into the token for good; it can be used there and never read back."""

        def create(lane: Lane) -> None:
            _must_be_free(lane, ObjectClass.SECRET_KEY, label)
            lane.session.create_object(
                {
                    Attribute.CLASS: ObjectClass.SECRET_KEY,
                    Attribute.KEY_TYPE: KeyType.GENERIC_SECRET,
                    Attribute.TOKEN: True,
                    Attribute.PRIVATE: True,
                    Attribute.SENSITIVE: True,
                    Attribute.EXTRACTABLE: False,
                    Attribute.SIGN: True,
                    Attribute.LABEL: label,
                    Attribute.VALUE: value,
                }
            )

        self._needing("HMAC keys", create)

    def mac(self, label: str, message: bytes) -> bytes:
        """HMAC-SHA-256 in the token; 32 bytes."""
        return self.sessions.run(
            lambda lane: bytes(lane.find(ObjectClass.SECRET_KEY, label).sign(message, mechanism=Mechanism.SHA256_HMAC)),
            again=True,
        )

    # -- what is there ------------------------------------------------------------------------------------------------

    def has_secret(self, label: str) -> bool:
        """Whether a secret key of this name is in the token."""
        return self._has(ObjectClass.SECRET_KEY, label)

    def has_key(self, label: str) -> bool:
        """Whether a private key of this name is in the token."""
        return self._has(ObjectClass.PRIVATE_KEY, label)

    def destroy_secret(self, label: str) -> None:
        """Destroy a secret key; nothing happens if it is gone already."""
        self._destroy(label, ObjectClass.SECRET_KEY)

    def destroy_key(self, label: str) -> None:
        """Destroy a key pair, both halves; nothing happens if it is gone already."""
        self._destroy(label, ObjectClass.PRIVATE_KEY, ObjectClass.PUBLIC_KEY)

    def inspect(self) -> tuple[KeyFacts, ...]:
        """Every object the token shows to this login, by label and kind."""
        found = self.sessions.run(
            lambda lane: [_facts(kind, each) for kind in _SHOWN for each in lane.search(kind)], again=True
        )
        self.require_present()  # a token that is away shows nothing, which must not pass for an empty one
        return tuple(sorted(found, key=lambda facts: (facts.label, facts.kind)))

    def destroy_everything(self) -> int:
        """Destroy every object the token shows to this login; how many there were."""

        def destroy(lane: Lane) -> int:
            found = [each for kind in _SHOWN for each in lane.search(kind)]
            for each in found:
                each.destroy()
            return len(found)

        count = self.sessions.run(destroy)
        self.require_present()
        return count

    def serial(self) -> str:
        """The token's serial number."""
        with self.module.in_use():
            return str(self.module.find(self.location).serial.decode("ascii", "replace").strip())

    def _has(self, kind: ObjectClass, label: str) -> bool:
        found = self.sessions.run(lambda lane: bool(lane.search(kind, label)), again=True)
        if not found:
            self.require_present()
        return found

    def _destroy(self, label: str, *kinds: ObjectClass) -> None:
        def destroy(lane: Lane) -> None:
            for kind in kinds:
                for found in lane.search(kind, label):
                    found.destroy()

        self.sessions.run(destroy, again=True)
        self.require_present()
        for kind in kinds:
            self.sessions.forget(kind, label)

    # -- counters ---------------------------------------------------------------------------------------------------

    def counter(self, label: str) -> int:
        """The value of a counter in the token; 0 if it never advanced."""
        found = self.sessions.run(lambda lane: _counts(lane, label), again=True)
        if not found:
            self.require_present()
        return max((value for value, _ in found), default=0)

    def advance(self, label: str) -> int:
        """Raise a counter by one, durably, and return the new value.

        SoftHSM's data objects cannot be changed, so the next one is written before the last is destroyed; a crash between
        leaves both, and the greater counts.
        """
        with self._counting:
            return self.set_counter(label, self.counter(label) + 1)

    def set_counter(self, label: str, value: int) -> int:
        """Put a counter to a value, never back: raises Misconfigured("token.counter_back")."""

        def write(lane: Lane) -> int:
            old = _counts(lane, label)
            newest = max((past for past, _ in old), default=0)
            if value <= newest:
                raise Misconfigured("token.counter_back", "a counter only rises", expected=f"> {newest}", got=value)
            lane.session.create_object(
                {
                    Attribute.CLASS: ObjectClass.DATA,
                    Attribute.TOKEN: True,
                    Attribute.PRIVATE: True,
                    Attribute.LABEL: label,
                    Attribute.VALUE: value.to_bytes(8, "big"),
                }
            )
            for _, past in old:
                past.destroy()
            return value

        return self.sessions.run(write)

    def _needing(self, what: str, work: Callable[[Lane], T]) -> T:
        def attempted(lane: Lane) -> T:
            try:
                return work(lane)
            except (MechanismInvalid, FunctionNotSupported) as error:
                raise Unavailable(
                    "token.lacks",
                    "this token does not have what this needs",
                    expected=what,
                    got=type(error).__name__,
                    remedy="moor hsm inspect lists what the token lacks, and what follows from it",
                ) from None

        return self.sessions.run(attempted)


def open_token(location: TokenLocation, *, lanes: int = LANES) -> LocalToken:
    """Log in to a token. Raises Misconfigured (`token.*`) if module, label or PIN is wrong, Unavailable if it is away."""
    location.require_sane()
    if location.pin_file is not None:
        location.pin()  # before the module is loaded: a wrong PIN file is the most frequent mistake
    module = Module.enter(location)
    try:
        return LocalToken(location, module, Sessions(module, location, lanes))
    except BaseException:
        module.leave()
        raise


def _protection(*, recoverable: bool) -> dict[Attribute, Any]:
    if not recoverable:
        return {Attribute.SENSITIVE: True, Attribute.EXTRACTABLE: False}
    return {Attribute.SENSITIVE: True, Attribute.EXTRACTABLE: True, Attribute.WRAP_WITH_TRUSTED: True}


def _must_be_free(lane: Lane, kind: ObjectClass, label: str) -> None:
    if lane.search(kind, label):
        raise Misconfigured(
            "token.key_exists",
            "the token already has a key of this name",
            got=label,
            remedy="this HSM was set up before; start with an empty directory",
        )


def _point(public: Any) -> bytes:  # noqa: ANN401 - a python-pkcs11 object
    """The point out of CKA_EC_POINT, a DER OCTET STRING (PKCS#11 3.0, 2.3.3)."""
    wrapped = bytes(public[Attribute.EC_POINT])
    if len(wrapped) != _P256_POINT + 2 or wrapped[:2] != bytes((4, _P256_POINT)):
        raise Misconfigured("token.key_kind", "the token's key is not an uncompressed point on P-256")
    return wrapped[2:]


def _edwards_point(public: Any) -> bytes:  # noqa: ANN401 - as above
    """CKA_EC_POINT of an Edwards key is an OCTET STRING of the raw key, which some tokens leave bare."""
    point = bytes(public[Attribute.EC_POINT])
    return point[2:] if len(point) == _ED25519_POINT + 2 and point[:2] == b"\x04\x20" else point


def _counts(lane: Lane, label: str) -> list[tuple[int, Any]]:
    found = lane.search(ObjectClass.DATA, label)
    return [(int.from_bytes(bytes(entry[Attribute.VALUE]), "big"), entry) for entry in found]


def _facts(kind: ObjectClass, found: Any) -> KeyFacts:  # noqa: ANN401 - a python-pkcs11 object
    def said(attribute: Attribute) -> Any:  # noqa: ANN401 - as many types as attributes
        try:
            return found[attribute]
        except (PKCS11Error, ValueError):
            return None

    secret = kind in (ObjectClass.PRIVATE_KEY, ObjectClass.SECRET_KEY)
    type_ = said(Attribute.KEY_TYPE) if kind is not ObjectClass.DATA else None
    uses = () if kind is ObjectClass.DATA else tuple(use.name.lower() for use in _USES if said(use))
    return KeyFacts(
        label=said(Attribute.LABEL) or "",
        kind=_KINDS[kind],
        type="" if type_ is None else getattr(type_, "name", str(type_)),
        sensitive=said(Attribute.SENSITIVE) if secret else None,
        extractable=said(Attribute.EXTRACTABLE) if secret else None,
        never_extractable=said(Attribute.NEVER_EXTRACTABLE) if secret else None,
        local=said(Attribute.LOCAL) if secret else None,
        trust_needed=said(Attribute.WRAP_WITH_TRUSTED) if secret else None,
        uses=uses,
    )
