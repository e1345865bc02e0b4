"""The sessions of one token: a few lanes, borrowed by threads, closed when the token goes and opened again when it is back.

1. An error that can mean "the token is gone" (PKCS#11 3.0, 5.1.6: CKR_DEVICE_REMOVED, CKR_TOKEN_NOT_PRESENT,
   CKR_SESSION_HANDLE_INVALID and the vague ones modules really give) is looked into before the next operation: if the module
   still sees the token and a session answers, the error was the operation's own.
2. Otherwise the module is restarted, the PIN is fetched from its source again, and the sessions are opened again; at most
   once a second while the token stays away. Until then every operation raises Unavailable("token.gone").
3. A PIN that the token refuses is never sent again by this process, and not by the next one
   (location.require_not_refused_before). A token that says the next wrong PIN is its last gets none.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable
from typing import Any, Final, TypeVar

from pkcs11 import Attribute, ObjectClass, TokenFlag
from pkcs11 import exceptions as raised
from pkcs11.exceptions import PKCS11Error

from moorline.errors import Misconfigured, Unavailable
from moorline.hsm.token.location import TokenLocation, forget_refused, remember_refused, require_not_refused_before
from moorline.hsm.token.module import Module

T = TypeVar("T")

LANES: Final = 4
_RETRY_S: Final = 1.0
_MAY_BE_GONE: Final = (
    *(raised.DeviceRemoved, raised.TokenNotPresent, raised.TokenNotRecognised, raised.SlotIDInvalid),
    *(raised.SessionHandleInvalid, raised.SessionClosed, raised.UserNotLoggedIn),
    *(raised.ObjectHandleInvalid, raised.KeyHandleInvalid),
    *(raised.GeneralError, raised.DeviceError, raised.FunctionFailed),
)
_PIN_REFUSED: Final = (raised.PinIncorrect, raised.PinInvalid, raised.PinLenRange, raised.PinExpired, raised.PinLocked)


class Lane:
    """One session, used by one thread at a time, with the handles it has already found."""

    def __init__(self, session: Any) -> None:  # noqa: ANN401 - python-pkcs11 is untyped here
        self.session = session
        self._found: dict[tuple[ObjectClass, str], Any] = {}

    def search(self, kind: ObjectClass, label: str | None = None) -> list[Any]:
        """All objects of a kind (and name). The search is run to its end: an abandoned one would keep the session busy."""
        self.session.generate_random(64)  # a dead session says so here, where nothing is left half done by it
        template: dict[Attribute, Any] = {Attribute.CLASS: kind}
        if label is not None:
            template[Attribute.LABEL] = label
        return list(self.session.get_objects(template))

    def find(self, kind: ObjectClass, label: str) -> Any:  # noqa: ANN401 - as above
        """The object called `label`; finding by label is linear in SoftHSM, so handles are kept."""
        known = self._found.get((kind, label))
        if known is None:
            found = self.search(kind, label)
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
        """A handle is void."""
        self._found.pop((kind, label), None)


class Sessions:
    """The lanes of one token."""

    def __init__(self, module: Module, location: TokenLocation, lanes: int = LANES) -> None:
        self._module, self._location, self._count = module, location, lanes
        self._free: queue.LifoQueue[Lane] = queue.LifoQueue()
        self._all: list[Lane] = []
        self._opened_in = 0
        self._suspect = False
        self._refused = False
        self._closed = False
        self._tried = -_RETRY_S
        self._opening = threading.RLock()
        with module.in_use():
            self._open()

    def close(self) -> None:
        """Close all; nothing happens if they are closed."""
        with self._opening:
            if self._closed:
                return
            self._closed = True
            with self._module.alone():  # a session that another thread works on must not be closed under it
                self._drop()
        self._module.leave()

    def run(self, work: Callable[[Lane], T], *, again: bool = False) -> T:
        """Work on a lane. With `again` (the work can be repeated harmlessly) it is done once more after a lost session."""
        try:
            return self._once(work)
        except Unavailable:
            if not again or not self._suspect:
                raise
        return self._once(work)

    def _once(self, work: Callable[[Lane], T]) -> T:
        if self._suspect or self._opened_in != self._module.incarnation:
            self._recover()
        with self._module.in_use():
            # Handles count from one again after a restart: an old one could name another token's session, or key.
            if self._opened_in != self._module.incarnation:
                self._suspect = True
                raise Unavailable("token.gone", "the token's module was restarted just now", retry_after_s=0.1)
            free = self._free
            lane = free.get()
            try:
                return work(lane)
            except Misconfigured as error:
                # A token that is gone shows no objects (SoftHSM), which must not pass for a key that never was.
                if error.code == "token.key_missing":
                    self._require_present()
                raise
            except PKCS11Error as error:
                self._suspect = self._suspect or isinstance(error, _MAY_BE_GONE)
                raise Unavailable("token.failed", "the token could not do it", got=type(error).__name__) from error
            finally:
                free.put(lane)

    def require_present(self) -> None:
        """Raises Unavailable("token.gone") if the module does not see the token now."""
        with self._module.in_use():
            self._require_present()

    def _require_present(self) -> None:
        try:
            self._module.find(self._location)
        except (Unavailable, Misconfigured) as error:
            self._suspect = True
            raise Unavailable("token.gone", "the token went away", expected=self._location.name, got=error.code) from None

    def forget(self, kind: ObjectClass, label: str) -> None:
        """A handle is void in all lanes."""
        for lane in self._all:
            lane.forget(kind, label)

    # -- losing and finding the token ---------------------------------------------------------------------------------

    def _recover(self) -> None:
        with self._opening:
            if self._refused or self._closed:
                raise self._refusal() if self._refused else Unavailable("token.closed", "the token was closed")
            if not self._suspect and self._opened_in == self._module.incarnation:
                return
            if self._opened_in == self._module.incarnation and self._answers():
                self._suspect = False
                return
            if time.monotonic() - self._tried < _RETRY_S:
                raise Unavailable("token.gone", "the token is away", expected=self._location.name, retry_after_s=_RETRY_S)
            self._tried = time.monotonic()
            if self._opened_in == self._module.incarnation or self._module.down:
                self._module.restart(self._opened_in)
            with self._module.in_use():
                self._drop()
                try:
                    self._open()
                except Misconfigured as error:
                    if error.code == "token.login":
                        raise Unavailable(
                            "token.gone",
                            "the token is away",
                            expected=self._location.name,
                            retry_after_s=_RETRY_S,
                        ) from None
                    raise
            self._suspect = False
            self._tried = -_RETRY_S

    def _answers(self) -> bool:
        """Does the module see the token, and does a session of every lane answer? Handles are looked up again."""
        try:
            with self._module.in_use():
                if self._opened_in != self._module.incarnation:
                    return False
                self._module.find(self._location)
                for lane in self._all:
                    lane.session.generate_random(64)
                    lane._found.clear()  # noqa: SLF001 - its own class, one file
        except (PKCS11Error, Unavailable, Misconfigured):
            return False
        return bool(self._all)

    def _open(self) -> None:
        token = self._module.find(self._location)
        pin = self._location.pin()
        require_not_refused_before(self._location, pin)
        self._require_tries_left(token)
        lanes: list[Lane] = []
        try:
            lanes.append(Lane(self._login(token, pin)))
            # The login belongs to the application, not to the session (PKCS#11 3.0, 2.4.7): later sessions inherit it.
            lanes.extend(Lane(token.open(rw=True)) for _ in range(self._count - 1))
        except PKCS11Error as error:
            for lane in lanes:
                with contextlib.suppress(PKCS11Error):
                    lane.session.close()
            raise Unavailable(
                "token.gone", "the token takes no sessions", expected=self._location.name, got=type(error).__name__
            ) from None
        forget_refused(self._location)
        self._all, self._opened_in = lanes, self._module.incarnation
        self._free = queue.LifoQueue()
        for lane in lanes:
            self._free.put(lane)

    def _login(self, token: Any, pin: str) -> Any:  # noqa: ANN401 - as above
        try:
            return token.open(rw=True, user_pin=pin)
        except raised.UserAlreadyLoggedIn:
            return token.open(rw=True)
        except _PIN_REFUSED as error:
            self._refused = True
            remember_refused(self._location, pin)
            raise self._refusal(error) from None

    def _refusal(self, error: PKCS11Error | None = None) -> Misconfigured:
        return Misconfigured(
            "token.pin_refused",
            "the token refuses this PIN; it was tried once and is not tried again, for tokens lock after a few wrong ones",
            expected=self._location.name,
            got=None if error is None else type(error).__name__,
            remedy="correct the PIN, then start again",
        )

    def _require_tries_left(self, token: Any) -> None:  # noqa: ANN401 - as above
        if token.flags & (TokenFlag.USER_PIN_LOCKED | TokenFlag.USER_PIN_FINAL_TRY):
            raise Misconfigured(
                "token.pin_last_try",
                "the token's PIN is locked, or one wrong try away from it; none is made",
                expected=self._location.name,
                remedy="have the security officer reset the PIN, or log in once by hand with the right one",
            )

    def _drop(self) -> None:
        # After a restart the old handles are nobody's, or somebody else's. The first lane logged in: closing it logs the
        # application out, so it goes last.
        if self._opened_in == self._module.incarnation:
            for lane in reversed(self._all):
                with contextlib.suppress(PKCS11Error):
                    lane.session.close()
        self._all = []
