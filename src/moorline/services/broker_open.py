"""Which functions have a session open, so that one can be ended the moment its instance does."""

from __future__ import annotations

from collections.abc import Callable

from moorline.errors import Conflict, MoorlineError


class OpenFunctions:
    """Sessions of functions by instance and generation: at most one each, the newest. Owned by one event loop."""

    def __init__(self) -> None:
        self._nonces: dict[str, dict[int, bytes]] = {}
        self._named: dict[bytes, tuple[str, int]] = {}
        self.working = 0
        """Requests that are being answered now: background work yields to them."""
        self._end: Callable[[bytes, MoorlineError], bool] = _nobody

    def bind(self, end: Callable[[bytes, MoorlineError], bool]) -> None:
        """How a session is ended by the nonce of its claim; known once the session port listens."""
        self._end = end

    def opened(self, instance: str, generation: int, nonce: bytes) -> None:
        """A function opened or resumed its session; an earlier one of the same instance is a broken connection's rest."""
        of_instance = self._nonces.setdefault(instance, {})
        before = of_instance.get(generation)
        of_instance[generation] = nonce
        self._named[nonce] = instance, generation
        if before is not None and before != nonce:
            del self._named[before]
            self._end(before, superseded())

    def ended(self, nonce: bytes) -> None:
        """A session is gone."""
        name = self._named.pop(nonce, None)
        if name is None:
            return
        instance, generation = name
        of_instance = self._nonces[instance]
        del of_instance[generation]
        if not of_instance:
            del self._nonces[instance]

    def end(self, instance: str, generation: int, reason: MoorlineError) -> bool:
        """End the session of an instance, if it has one; its function is told why."""
        nonce = self._nonces.get(instance, {}).get(generation)
        return nonce is not None and self._end(nonce, reason)

    def names(self) -> tuple[tuple[str, int], ...]:
        """Every instance and generation that has a session here."""
        return tuple(self._named.values())

    def held(self) -> dict[tuple[str, int], bytes]:
        """The nonce of every session here, by instance and generation."""
        return {name: nonce for nonce, name in self._named.items()}

    def end_before(self, instance: str, generation: int, reason: MoorlineError) -> None:
        """End the sessions of all earlier generations."""
        for number in tuple(self._nonces.get(instance, ())):
            if number < generation:
                self.end(instance, number, reason)


def superseded() -> Conflict:
    """Why the older of two sessions of one instance ends."""
    return Conflict("session.superseded", "this instance opened a newer session")


def _nobody(_nonce: bytes, _reason: MoorlineError) -> bool:
    return False
