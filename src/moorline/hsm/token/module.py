"""One PKCS#11 library in this process: initialised for threads, restarted when its tokens went away.

The locking trap, and the one place where it is solved. python-pkcs11 calls `C_Initialize(NULL)`, which tells a module that
the application is single-threaded; SoftHSM then takes no locks and two threads corrupt its heap (FINDINGS.md). python-pkcs11
offers no other way to initialise, so `Module.enter` lets it load the module, finalises the module behind its back before
any session exists, and initialises it again with CKF_OS_LOCKING_OK (PKCS#11 3.0, 5.4). tests/hsm/test_token.py runs two
threads both ways: without the second step the process dies.

A token directory belongs to one process (two processes on one SoftHSM directory race; hsm.token.owner serves the others),
and a process has one configuration open per module at a time. Several tokens of one configuration can be open at once.

A module that lost its tokens finds them again only by C_Finalize and C_Initialize (SoftHSM does). All its users are kept out
meanwhile, and each opens its sessions again when it sees that `incarnation` has moved.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import pkcs11
from pkcs11.exceptions import PKCS11Error

from moorline.errors import Misconfigured, Unavailable
from moorline.hsm.token.location import TokenLocation
from moorline.hsm.token.native import NativeModule

_SOFTHSM_CONF: Final = "SOFTHSM2_CONF"


class Module:
    """One loaded PKCS#11 library; counts the tokens open in it."""

    _loaded: Final[dict[str, Module]] = {}
    _guard: Final = threading.Lock()

    def __init__(self, path: str, library: Any, native: NativeModule) -> None:  # noqa: ANN401 - python-pkcs11 is untyped here
        self.path = path
        self.library = library
        self.native = native
        self.incarnation = 0
        self.restarts = 0
        self.down = False
        self.users = 0
        self.environment: dict[str, str] = {}
        self._calls = threading.Condition()
        self._inside = 0
        self._restarting = False
        self._lock: int | None = None

    @classmethod
    def enter(cls, location: TokenLocation) -> Module:
        """The module of a token, ready for threads, under the token's environment. Raises Misconfigured (`token.*`)."""
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
                native = NativeModule(location.module)
                lock = _own(location.module, wanted)
                try:
                    os.environ.update(wanted)
                    module = cls._initialised(location.module, module, native)
                except BaseException:
                    _disown(lock)
                    raise
                module.environment, module._lock = wanted, lock  # noqa: SLF001 - its own class
            module.users += 1
            return module

    @classmethod
    def _initialised(cls, path: str, module: Module | None, native: NativeModule) -> Module:
        try:
            if module is None:
                module = Module(path, pkcs11.lib(path), native)
                cls._loaded[path] = module
        except PKCS11Error as error:
            raise Misconfigured(
                "token.module",
                "the PKCS#11 module could not be initialised",
                expected=path,
                got=type(error).__name__,
                remedy="see that the module exists and its own configuration is readable",
            ) from error
        module.native.finalize()
        module.native.initialize_for_threads()
        module.incarnation += 1
        module.down = False
        return module

    def leave(self) -> None:
        """One user less; the last one lets other processes have the token directory."""
        with self._guard:
            self.users -= 1
            if not self.users:
                _disown(self._lock)
                self._lock = None

    @contextlib.contextmanager
    def in_use(self) -> Iterator[None]:
        """Calls into the module belong inside: nobody restarts it meanwhile."""
        with self._calls:
            while self._restarting:
                self._calls.wait()
            self._inside += 1
        try:
            yield
        finally:
            with self._calls:
                self._inside -= 1
                if not self._inside:
                    self._calls.notify_all()

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Nobody else is in the module, and nobody gets in. Not from inside `in_use`."""
        with self._calls:
            while self._restarting:
                self._calls.wait()
            self._restarting = True  # from here on nobody new gets in, or a busy module would never be left
            while self._inside:
                self._calls.wait()
        try:
            yield
        finally:
            with self._calls:
                self._restarting = False
                self._calls.notify_all()

    def restart(self, seen: int) -> None:
        """Finalise and initialise again, unless somebody did since `seen`. Not from inside `in_use`.

        Raises Unavailable("token.gone") while the module cannot start.
        """
        with self.restarted(seen):
            pass

    @contextlib.contextmanager
    def restarted(self, seen: int | None = None) -> Iterator[None]:
        """The module is down inside, and initialised again behind; as `restart`."""
        with self.alone():
            if seen is not None and self.incarnation != seen and not self.down:
                yield
                return
            self.native.finalize()
            self.down = True
            try:
                yield
            finally:
                self.incarnation += 1
                self.restarts += 1
                try:
                    self.native.initialize_for_threads()
                    self.down = False
                except Misconfigured as error:
                    raise Unavailable(
                        "token.gone",
                        "the PKCS#11 module does not come back",
                        got=error.got,
                        remedy="see the HSM and its host",
                    ) from None

    def find(self, location: TokenLocation) -> Any:  # noqa: ANN401 - as above
        """The one initialised token of a location. Raises Unavailable("token.gone") or Misconfigured("token.login")."""
        try:
            found = [token for token in self.tokens() if _is_meant(token, location)]
        except PKCS11Error as error:
            raise Unavailable(
                "token.gone",
                "the module cannot see its tokens",
                expected=location.name,
                got=type(error).__name__,
                remedy="see that the HSM is connected, or the token directory is where it was",
            ) from None
        if len(found) != 1:
            raise Misconfigured(
                "token.login",
                "the module has not exactly one such token",
                expected=location.name,
                got=len(found),
                remedy="see token_label, token_serial, token_slot and the module's own configuration",
            )
        return found[0]

    def tokens(self) -> Iterator[Any]:
        """All initialised tokens the module sees."""
        for slot in self.library.get_slots(token_present=True):
            token = slot.get_token()
            if token.flags & pkcs11.TokenFlag.TOKEN_INITIALIZED:
                yield token

    def free_slot(self) -> int:
        """A slot whose token is not initialised. Raises Unavailable("token.no_free_slot")."""
        try:
            for slot in self.library.get_slots(token_present=True):
                if not slot.get_token().flags & pkcs11.TokenFlag.TOKEN_INITIALIZED:
                    return int(slot.slot_id)
        except PKCS11Error as error:
            raise Unavailable("token.gone", "the module cannot see its tokens", got=type(error).__name__) from None
        raise Unavailable(
            "token.no_free_slot",
            "the module has no slot left for a token",
            got=self.path,
            remedy="make a partition on the HSM with its vendor's tool, and name it",
        )


def _own(module: str, environment: Mapping[str, str]) -> int | None:
    """Take a SoftHSM directory for this process. Raises Misconfigured("token.owned"); the kernel frees it when we die."""
    inherited = os.environ.get(_SOFTHSM_CONF) if "softhsm" in Path(module).name else None
    configuration = environment.get(_SOFTHSM_CONF, inherited)
    if configuration is None or not Path(configuration).exists():
        return None
    path = Path(configuration).with_name("owner.lock")
    try:
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise Misconfigured(
            "token.owner_lock", "the token directory cannot be taken for this process", expected=path, got=error.strerror
        ) from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(lock)
        raise Misconfigured(
            "token.owned",
            "another process has this SoftHSM token open; two would corrupt it",
            expected=path,
            remedy="ask its owner: set token_owner to the socket of moor hsm serve, or stop the other process",
        ) from None
    return lock


def _disown(lock: int | None) -> None:
    if lock is not None:
        os.close(lock)


def _is_meant(token: Any, location: TokenLocation) -> bool:  # noqa: ANN401 - as above
    wanted = (
        (location.label, token.label),
        (location.serial, token.serial.decode("ascii", "replace").strip()),
        (location.slot, token.slot.slot_id),
    )
    return all(said is None or said == found for said, found in wanted)
