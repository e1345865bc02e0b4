"""A PKCS#11 token: keys that are used by name and never shown. Module path, label and PIN file are all it needs.

The locking trap, and the one place where it is solved. python-pkcs11 calls `C_Initialize(NULL)`, which tells a module that
the application is single-threaded; SoftHSM then takes no locks and two threads corrupt its heap (FINDINGS.md). python-pkcs11
offers no other way to initialise, so `_Module.enter` lets it load the module, finalises the module behind its back before
any session exists, and initialises it again with CKF_OS_LOCKING_OK (PKCS#11 3.0, 5.4). tests/hsm/test_token.py runs two
threads both ways: without the second step the process dies.

A token directory belongs to one process (two processes on one SoftHSM directory race), and a process has one token directory
open per module at a time.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import queue
import secrets
import shutil
import subprocess
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import pkcs11
from pkcs11 import Attribute, GCMParams, KeyType, Mechanism, MechanismFlag, ObjectClass
from pkcs11.exceptions import PKCS11Error
from pkcs11.util.ec import encode_named_curve_parameters

from moorline.errors import Misconfigured, NotAuthentic, Unavailable

SOFTHSM_MODULES: Final = (
    "/usr/lib/softhsm/libsofthsm2.so",
    "/usr/lib/x86_64-linux-gnu/softhsm/libsofthsm2.so",
    "/usr/lib64/pkcs11/libsofthsm2.so",
)
_OS_LOCKING_OK: Final = 2
_LANES: Final = 4
_GCM_NONCE: Final = 12
_GCM_TAG_BITS: Final = 128
_P256_POINT: Final = 65


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLocation:
    """Where a token is. The PIN is read from a file at the moment of use and kept nowhere.

    `environment` is set before the module is loaded, for modules that read their own configuration (SOFTHSM2_CONF).
    """

    module: str
    label: str
    pin_file: Path
    environment: Mapping[str, str] = field(default_factory=dict)


class _InitializeArgs(ctypes.Structure):
    """CK_C_INITIALIZE_ARGS (PKCS#11 3.0, 3.7)."""

    _fields_ = (
        ("create_mutex", ctypes.c_void_p),
        ("destroy_mutex", ctypes.c_void_p),
        ("lock_mutex", ctypes.c_void_p),
        ("unlock_mutex", ctypes.c_void_p),
        ("flags", ctypes.c_ulong),
        ("reserved", ctypes.c_void_p),
    )


class _Module:
    """One loaded PKCS#11 library, initialised for threads; counts the tokens open in it."""

    _loaded: Final[dict[str, _Module]] = {}
    _guard: Final = threading.Lock()

    def __init__(self, path: str, library: Any) -> None:  # noqa: ANN401 - python-pkcs11's own class has no type
        self.path = path
        self.library = library
        self.users = 0
        self.environment: dict[str, str] = {}

    @classmethod
    def enter(cls, location: TokenLocation) -> _Module:
        """The module of a token, ready for threads, under the token's environment."""
        with cls._guard:
            module = cls._loaded.get(location.module)
            wanted = dict(location.environment)
            if module is not None and module.users and module.environment != wanted:
                raise Misconfigured(
                    "token.module_busy",
                    "the PKCS#11 module is open with another configuration in this process",
                    expected=sorted(module.environment.values()),
                    got=sorted(wanted.values()),
                    remedy="close the other token first, or use a process for each token",
                )
            if module is None or module.users == 0:
                os.environ.update(wanted)
                module = cls._initialised(location.module, module)
                module.environment = wanted
            module.users += 1
            return module

    @classmethod
    def _initialised(cls, path: str, module: _Module | None) -> _Module:
        native = _native(path)
        try:
            if module is None:
                module = _Module(path, pkcs11.lib(path))
                cls._loaded[path] = module
        except PKCS11Error as error:
            raise Misconfigured(
                "token.module",
                "the PKCS#11 module could not be initialised",
                expected=path,
                got=type(error).__name__,
                remedy="see that the module exists and its own configuration is readable",
            ) from error
        native.C_Finalize(None)
        outcome = native.C_Initialize(ctypes.byref(_InitializeArgs(flags=_OS_LOCKING_OK)))
        if outcome != 0:
            raise Misconfigured("token.module", "the PKCS#11 module refuses to work with threads", got=hex(outcome))
        return module

    def leave(self) -> None:
        with self._guard:
            self.users -= 1


def _native(path: str) -> ctypes.CDLL:
    try:
        return ctypes.CDLL(path)
    except OSError as error:
        raise Misconfigured(
            "token.module",
            "the PKCS#11 module could not be loaded",
            expected=path,
            got=error,
            remedy="install softhsm2, or name your HSM's module in token_module",
        ) from None


class _Lane:
    """One session, used by one thread at a time, with the handles it has already found."""

    def __init__(self, session: Any) -> None:  # noqa: ANN401 - as above
        self.session = session
        self._found: dict[tuple[ObjectClass, str], Any] = {}

    def find(self, kind: ObjectClass, label: str) -> Any:  # noqa: ANN401 - as above
        """The object called `label`; finding by label is linear in SoftHSM, so handles are kept."""
        known = self._found.get((kind, label))
        if known is None:
            # The search is run to its end: an abandoned one would keep the session busy.
            found = list(self.session.get_objects({Attribute.CLASS: kind, Attribute.LABEL: label}))
            if len(found) != 1:
                raise Misconfigured(
                    "token.key_missing",
                    "the token has not exactly one object of this name",
                    expected=f"{kind.name} {label}",
                    got=len(found),
                    remedy="run the set-up of this HSM, or open the token that it was run on",
                )
            known = self._found[kind, label] = found[0]
        return known

    def forget(self, kind: ObjectClass, label: str) -> None:
        self._found.pop((kind, label), None)


class Token:
    """An open token. Thread-safe: each operation borrows one of a few sessions.

    Keys made here are sensitive and not extractable; there is no method that returns one. Errors of the module become
    Unavailable("token.failed") without its parameters.
    """

    def __init__(self, module: _Module, lanes: list[_Lane]) -> None:
        self._module = module
        self._lanes: queue.LifoQueue[_Lane] = queue.LifoQueue()
        self._all = lanes
        for lane in lanes:
            self._lanes.put(lane)
        self._counting = threading.Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close the sessions. The token can be opened again afterwards."""
        lanes, self._all = self._all, []
        if not lanes:
            return
        for lane in lanes:
            with contextlib.suppress(PKCS11Error):
                lane.session.close()
        self._module.leave()

    @contextlib.contextmanager
    def _lane(self) -> Iterator[_Lane]:
        lane = self._lanes.get()
        try:
            yield lane
        except PKCS11Error as error:
            raise Unavailable("token.failed", "the token could not do it", got=type(error).__name__) from error
        finally:
            self._lanes.put(lane)

    # -- randomness -------------------------------------------------------------------------------------------------

    def random(self, size: int) -> bytes:
        """`size` bytes of the token's generator."""
        with self._lane() as lane:
            return bytes(lane.session.generate_random(size * 8))

    # -- EC P-256 ---------------------------------------------------------------------------------------------------

    def generate_ec_key(self, label: str, *, derive: bool = False) -> bytes:
        """Make a P-256 key pair in the token, to sign with or (`derive`) to agree with; the 65-byte public point."""
        use = MechanismFlag.DERIVE if derive else MechanismFlag.SIGN | MechanismFlag.VERIFY
        with self._lane() as lane:
            self._must_be_free(lane, ObjectClass.PRIVATE_KEY, label)
            parameters = lane.session.create_domain_parameters(
                KeyType.EC, {Attribute.EC_PARAMS: encode_named_curve_parameters("secp256r1")}, local=True
            )
            public, _ = parameters.generate_keypair(
                store=True,
                label=label,
                capabilities=use,
                mechanism=Mechanism.EC_KEY_PAIR_GEN,
                private_template={Attribute.SENSITIVE: True, Attribute.EXTRACTABLE: False},
            )
            return _point(public)

    def ec_point(self, label: str) -> bytes:
        """The uncompressed public point (65 bytes) of an EC key in the token."""
        with self._lane() as lane:
            return _point(lane.find(ObjectClass.PUBLIC_KEY, label))

    def ecdsa(self, label: str, digest: bytes) -> bytes:
        """The signature r | s (64 bytes) over a digest, which the caller made."""
        with self._lane() as lane:
            return bytes(lane.find(ObjectClass.PRIVATE_KEY, label).sign(digest, mechanism=Mechanism.ECDSA))

    # -- secrets ----------------------------------------------------------------------------------------------------

    def generate_wrapping_key(self, label: str) -> None:
        """Make an AES-256 key in the token for `seal` and `unseal`."""
        with self._lane() as lane:
            self._must_be_free(lane, ObjectClass.SECRET_KEY, label)
            lane.session.generate_key(
                KeyType.AES,
                256,
                store=True,
                label=label,
                capabilities=MechanismFlag.ENCRYPT | MechanismFlag.DECRYPT,
                template={Attribute.SENSITIVE: True, Attribute.EXTRACTABLE: False},
            )

    def seal(self, label: str, plaintext: bytes, bound_to: bytes) -> bytes:
        """A nonce, then ciphertext and tag of AES-256-GCM in the token; `bound_to` is authenticated and not contained."""
        nonce = self.random(_GCM_NONCE)
        with self._lane() as lane:
            key = lane.find(ObjectClass.SECRET_KEY, label)
            parameters = GCMParams(nonce, bound_to, _GCM_TAG_BITS)
            return nonce + bytes(key.encrypt(plaintext, mechanism=Mechanism.AES_GCM, mechanism_param=parameters))

    def unseal(self, label: str, sealed: bytes, bound_to: bytes) -> bytes:
        """What `seal` was given. Raises NotAuthentic("token.unseal") if any bit of it, or `bound_to`, is another."""
        with self._lane() as lane:
            key = lane.find(ObjectClass.SECRET_KEY, label)
            parameters = GCMParams(sealed[:_GCM_NONCE], bound_to, _GCM_TAG_BITS)
            try:
                plain = key.decrypt(sealed[_GCM_NONCE:], mechanism=Mechanism.AES_GCM, mechanism_param=parameters)
            except PKCS11Error as error:
                raise NotAuthentic(
                    "token.unseal",
                    "a sealed value does not belong to this token or this place",
                    got=type(error).__name__,
                    remedy="the database was changed, or comes from another HSM",
                ) from None
            return bytes(plain)

    def import_mac_key(self, label: str, value: bytes) -> None:
        """Put an HMAC key into the token for good; it can be used there and never read back."""
        with self._lane() as lane:
            self._must_be_free(lane, ObjectClass.SECRET_KEY, label)
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

    def mac(self, label: str, message: bytes) -> bytes:
        """HMAC-SHA-256 in the token; 32 bytes."""
        with self._lane() as lane:
            return bytes(lane.find(ObjectClass.SECRET_KEY, label).sign(message, mechanism=Mechanism.SHA256_HMAC))

    def has_secret(self, label: str) -> bool:
        """Whether a secret key of this name is in the token."""
        with self._lane() as lane:
            return _exists(lane, ObjectClass.SECRET_KEY, label)

    def destroy_secret(self, label: str) -> None:
        """Destroy a secret key; nothing happens if it is gone already."""
        with self._lane() as lane:
            template = {Attribute.CLASS: ObjectClass.SECRET_KEY, Attribute.LABEL: label}
            for found in list(lane.session.get_objects(template)):
                found.destroy()
        for lane in self._all:
            lane.forget(ObjectClass.SECRET_KEY, label)

    # -- counters ---------------------------------------------------------------------------------------------------

    def counter(self, label: str) -> int:
        """The value of a counter in the token; 0 if it never advanced."""
        with self._lane() as lane:
            return max((value for value, _ in _counts(lane, label)), default=0)

    def advance(self, label: str) -> int:
        """Raise a counter by one, durably, and return the new value.

        SoftHSM's data objects cannot be changed, so the next one is written before the last is destroyed; a crash between
        leaves both, and the greater counts.
        """
        with self._counting, self._lane() as lane:
            old = _counts(lane, label)
            value = max((value for value, _ in old), default=0) + 1
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

    @staticmethod
    def _must_be_free(lane: _Lane, kind: ObjectClass, label: str) -> None:
        if _exists(lane, kind, label):
            raise Misconfigured(
                "token.key_exists",
                "the token already has a key of this name",
                got=label,
                remedy="this HSM was set up before; start with an empty directory",
            )


def open_token(location: TokenLocation) -> Token:
    """Log in to a token. Raises Misconfigured (`token.*`) if module, label or PIN is wrong."""
    pin = _pin(location.pin_file)
    module = _Module.enter(location)
    lanes: list[_Lane] = []
    try:
        token = module.library.get_token(token_label=location.label)
        lanes.append(_Lane(token.open(rw=True, user_pin=pin)))
        # The login belongs to the application, not to the session (PKCS#11 3.0, 2.4.7): later sessions inherit it.
        lanes.extend(_Lane(token.open(rw=True)) for _ in range(_LANES - 1))
    except PKCS11Error as error:
        for lane in lanes:
            lane.session.close()
        module.leave()
        raise Misconfigured(
            "token.login",
            "the token could not be opened",
            expected=f"token {location.label} in {location.module}",
            got=type(error).__name__,
            remedy="see token_label, token_pin_file and the module's own configuration",
        ) from None
    return Token(module, lanes)


def softhsm_module() -> str:
    """The path of SoftHSM's module on this machine; raises Misconfigured("token.softhsm_missing")."""
    for path in SOFTHSM_MODULES:
        if Path(path).exists():
            return path
    raise Misconfigured("token.softhsm_missing", "SoftHSM is not installed", remedy="apt-get install softhsm2")


def initialise_softhsm(directory: Path, *, label: str) -> TokenLocation:
    """A new SoftHSM token in its own directory (0700) with random PINs; the user PIN is in `pin` (0600).

    The security officer's PIN is not kept: nobody resets this token, one makes another.
    """
    utility = shutil.which("softhsm2-util")
    if utility is None:
        raise Misconfigured("token.softhsm_missing", "SoftHSM is not installed", remedy="apt-get install softhsm2")
    directory = directory.resolve()
    tokens = directory / "tokens"
    for folder in (directory, tokens):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    configuration = directory / "softhsm2.conf"
    configuration.write_text(
        f"directories.tokendir = {tokens}\nobjectstore.backend = file\nobjectstore.umask = 0077\nlog.level = ERROR\n"
    )
    pin_file = directory / "pin"
    pin = secrets.token_hex(16)
    with os.fdopen(os.open(pin_file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as out:
        out.write(pin)
    environment = {"SOFTHSM2_CONF": str(configuration)}
    # softhsm2-util takes PINs as arguments only; they stand in /proc for its short life, on the broker's own host,
    # which PROTOCOLS.md counts in the provider's trusted base.
    done = subprocess.run(
        [utility, "--init-token", "--free", "--label", label, "--so-pin", secrets.token_hex(16), "--pin", pin],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    if done.returncode != 0:
        raise Misconfigured("token.initialise", "softhsm2-util could not make a token", got=done.stderr.strip())
    return TokenLocation(module=softhsm_module(), label=label, pin_file=pin_file, environment=environment)


def _pin(path: Path) -> str:
    try:
        if path.stat().st_mode & 0o077:
            raise Misconfigured(
                "token.pin_exposed", "the PIN file can be read by others", got=path, remedy=f"chmod 600 {path}"
            )
        return path.read_text().strip()
    except OSError as error:
        raise Misconfigured("token.pin_file", "the PIN file cannot be read", expected=path, got=error.strerror) from None


def _point(public: Any) -> bytes:  # noqa: ANN401 - a python-pkcs11 object
    """The point out of CKA_EC_POINT, a DER OCTET STRING (PKCS#11 3.0, 2.3.3)."""
    wrapped = bytes(public[Attribute.EC_POINT])
    if len(wrapped) != _P256_POINT + 2 or wrapped[:2] != bytes((4, _P256_POINT)):
        raise Misconfigured("token.key_kind", "the token's key is not an uncompressed point on P-256")
    return wrapped[2:]


def _exists(lane: _Lane, kind: ObjectClass, label: str) -> bool:
    return bool(list(lane.session.get_objects({Attribute.CLASS: kind, Attribute.LABEL: label})))


def _counts(lane: _Lane, label: str) -> list[tuple[int, Any]]:
    found = list(lane.session.get_objects({Attribute.CLASS: ObjectClass.DATA, Attribute.LABEL: label}))
    return [(int.from_bytes(bytes(entry[Attribute.VALUE]), "big"), entry) for entry in found]
