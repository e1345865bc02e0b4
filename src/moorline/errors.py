"""The one error tree, by whose fault it is.

    MoorlineError
    ├── Malformed       the bytes are not what the format says            HTTP 400, exit 2
    ├── NotAuthentic    a signature, chain, MAC or identity does not hold  HTTP 401, exit 1
    ├── Refused         understood, authentic, and the answer is no        HTTP 403, exit 1
    ├── Conflict        the state moved on: used, taken, already there     HTTP 409, exit 1
    ├── Unavailable     cannot be decided now; `retry_after_s` says when   HTTP 503, exit 2
    └── Misconfigured   this process was set up wrongly                    HTTP 500, exit 2

Every error names a stable dotted code (docs/reference/codes.md lists them all), what was expected, what was
found, and what to do next. None of these fields ever holds a secret. HTTP statuses and exit codes are taken
from the table in this module and from nowhere else.
"""

from __future__ import annotations

from typing import ClassVar, Final

EXIT_YES: Final = 0
EXIT_REFUSED: Final = 1
EXIT_UNDECIDED: Final = 2
EXIT_USAGE: Final = 64

_FIELD_CAP: Final = 400


class MoorlineError(Exception):
    """Base of all errors this package raises on purpose. `code` is stable; `says` is for people."""

    http_status: ClassVar[int] = 500
    exit_code: ClassVar[int] = EXIT_UNDECIDED

    def __init__(
        self,
        code: str,
        says: str,
        *,
        expected: object = None,
        got: object = None,
        remedy: str | None = None,
    ) -> None:
        self.code = code
        self.says = says
        self.expected = _shown(expected)
        self.got = _shown(got)
        self.remedy = remedy
        super().__init__(code, says)

    def __str__(self) -> str:
        parts = [f"{self.says} [{self.code}]"]
        if self.expected is not None:
            parts.append(f"expected {self.expected}")
        if self.got is not None:
            parts.append(f"got {self.got}")
        if self.remedy is not None:
            parts.append(f"next: {self.remedy}")
        return "; ".join(parts)

    def as_problem(self) -> dict[str, str | float]:
        """The error as it crosses a process boundary (RFC 9457 members plus ours). Absent fields are left out."""
        problem: dict[str, str | float] = {"kind": type(self).__name__, "code": self.code, "says": self.says}
        for name in ("expected", "got", "remedy"):
            value = getattr(self, name)
            if value is not None:
                problem[name] = value
        return problem


class Malformed(MoorlineError):
    """The bytes are not what the format says."""

    http_status = 400


class NotAuthentic(MoorlineError):
    """A signature, a chain, a MAC or an identity does not hold."""

    http_status = 401
    exit_code = EXIT_REFUSED


class Refused(MoorlineError):
    """The request was understood and authentic, and the answer is no."""

    http_status = 403
    exit_code = EXIT_REFUSED


class Conflict(MoorlineError):
    """The state moved on: used, taken or already there."""

    http_status = 409
    exit_code = EXIT_REFUSED


class Unavailable(MoorlineError):
    """It cannot be decided now. `retry_after_s` says when to ask again."""

    http_status = 503

    def __init__(
        self,
        code: str,
        says: str,
        *,
        expected: object = None,
        got: object = None,
        remedy: str | None = None,
        retry_after_s: float = 1.0,
    ) -> None:
        super().__init__(code, says, expected=expected, got=got, remedy=remedy)
        self.retry_after_s = retry_after_s

    def as_problem(self) -> dict[str, str | float]:
        """As the base, with `retry_after_s`."""
        return {**super().as_problem(), "retry_after_s": self.retry_after_s}


class Misconfigured(MoorlineError):
    """The process was set up wrongly; asking again will not help."""


_KINDS: Final[dict[str, type[MoorlineError]]] = {
    kind.__name__: kind for kind in (Malformed, NotAuthentic, Refused, Conflict, Misconfigured)
}


def from_problem(problem: object) -> MoorlineError:
    """The error that another process reported, rebuilt from `as_problem()`.

    The input is untrusted: whatever is not a well-formed problem becomes `Malformed("peer.problem_malformed")`.
    """
    if not isinstance(problem, dict):
        return Malformed("peer.problem_malformed", "the peer reported an error that cannot be read", got=problem)
    texts = {name: problem.get(name) for name in ("kind", "code", "says", "expected", "got", "remedy")}
    kind, code, says = texts["kind"], texts["code"], texts["says"]
    if not (isinstance(kind, str) and isinstance(code, str) and isinstance(says, str)):
        return Malformed("peer.problem_malformed", "the peer reported an error that cannot be read", got=problem)
    remedy = texts["remedy"] if isinstance(texts["remedy"], str) else None
    if kind == "Unavailable":
        wait = problem.get("retry_after_s")
        return Unavailable(
            code,
            says,
            expected=texts["expected"],
            got=texts["got"],
            remedy=remedy,
            retry_after_s=float(wait) if isinstance(wait, int | float) else 1.0,
        )
    chosen = _KINDS.get(kind)
    if chosen is None:
        return Malformed("peer.problem_malformed", "the peer reported an unknown kind of error", got=kind)
    return chosen(code, says, expected=texts["expected"], got=texts["got"], remedy=remedy)


def _shown(value: object) -> str | None:
    if value is None:
        return None
    text = value.hex() if isinstance(value, bytes) else str(value)
    return text if len(text) <= _FIELD_CAP else text[: _FIELD_CAP - 1] + "…"
