"""Which functions have a session open, so that one can be ended the moment its instance does."""

from __future__ import annotations

from collections.abc import Callable

from moorline.errors import Conflict, MoorlineError


class OpenFunctions:
    """Sessions of functions by instance and generation: at most one each, the newest. Owned by one event loop."""

    def __init__(self) -> None:
        self._nonces: dict[tuple[str, int], bytes] = {}
        self.working = 0
        """Requests that are being answered now: background work yields to them."""
        self._end: Callable[[bytes, MoorlineError], bool] = _nobody

    def bind(self, end: Callable[[bytes, MoorlineError], bool]) -> None:
        """How a session is ended by the nonce of its claim; known once the session port listens."""
        self._end = end

    def opened(self, instance: str, generation: int, nonce: bytes) -> None:
        """A function opened or resumed its session; an earlier one of the same instance is a broken connection's rest."""
        before = self._nonces.get((instance, generation))
        self._nonces[(instance, generation)] = nonce
        if before is not None and before != nonce:
            self._end(before, Conflict("session.superseded", "this instance opened a newer session"))

    def ended(self, nonce: bytes) -> None:
        """A session is gone."""
        for name in [name for name, kept in self._nonces.items() if kept == nonce]:
            del self._nonces[name]

    def end(self, instance: str, generation: int, reason: MoorlineError) -> bool:
        """End the session of an instance, if it has one; its function is told why."""
        nonce = self._nonces.get((instance, generation))
        return nonce is not None and self._end(nonce, reason)

    def names(self) -> tuple[tuple[str, int], ...]:
        """Every instance and generation that has a session here."""
        return tuple(self._nonces)

    def end_before(self, instance: str, generation: int, reason: MoorlineError) -> None:
        """End the sessions of all earlier generations."""
        for name, number in list(self._nonces):
            if name == instance and number < generation:
                self.end(name, number, reason)


def _nobody(_nonce: bytes, _reason: MoorlineError) -> bool:
    return False
