"""Where a token is and where its PIN comes from. A PIN is never an argument of a program and never in a log.

A PIN from a file is read at the moment of each login and kept nowhere. One from the environment is taken out of the
environment when it is first used, so that no child process inherits it, and one that was typed is typed once: both are kept
in this process's memory, since a token that went away and came back wants the PIN again.
"""

from __future__ import annotations

import contextlib
import getpass
import hashlib
import hmac
import json
import os
import secrets
import threading
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from moorline.errors import Misconfigured
from moorline.storage import whole_files

_KEPT: Final[dict[str, str]] = {}
_KEEPING: Final = threading.Lock()
_PROMPT: Final = "\0prompt"
_MARK_ROUNDS: Final = 100_000


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLocation:
    """A token by module and label, serial number or slot; all that are given must hold. The PIN has exactly one source.

    `environment` is set before the module is loaded, for modules that read their own configuration (SOFTHSM2_CONF).
    `pin_environment` names a variable. `pin_prompt` asks at the terminal.
    """

    module: str
    label: str | None = None
    serial: str | None = None
    slot: int | None = None
    pin_file: Path | None = None
    pin_environment: str | None = None
    pin_prompt: bool = False
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The token for people."""
        named = (("token", self.label), ("serial", self.serial), ("slot", self.slot))
        return ", ".join(f"{what} {value}" for what, value in named if value is not None) + f" in {self.module}"

    def require_sane(self) -> None:
        """Raises Misconfigured("token.location") unless the token is named and its PIN has one source."""
        sources = sum((self.pin_file is not None, self.pin_environment is not None, self.pin_prompt))
        if (self.label, self.serial, self.slot) == (None, None, None) or sources != 1:
            raise Misconfigured(
                "token.location",
                "a token needs a label, serial number or slot, and exactly one source of its PIN",
                got=self.name,
                remedy="set token_label, and one of token_pin_file, token_pin_environment and token_pin_prompt",
            )

    def pin(self) -> str:
        """The PIN. Raises Misconfigured (`token.pin_*`)."""
        if self.pin_file is not None:
            return _of_file(self.pin_file)
        if self.pin_environment is not None:
            return _of_environment(self.pin_environment)
        return _typed(self.name)


def _of_file(path: Path) -> str:
    try:
        if path.stat().st_mode & 0o077:
            raise Misconfigured(
                "token.pin_exposed", "the PIN file can be read by others", got=path, remedy=f"chmod 600 {path}"
            )
        return path.read_text().strip()
    except OSError as error:
        raise Misconfigured("token.pin_file", "the PIN file cannot be read", expected=path, got=error.strerror) from None


def _of_environment(variable: str) -> str:
    with _KEEPING:
        found = os.environ.pop(variable, None)
        if found is not None:
            _KEPT[variable] = found
        kept = _KEPT.get(variable)
    if not kept:
        raise Misconfigured(
            "token.pin_environment",
            "the variable that should hold the PIN is not set",
            expected=variable,
            remedy=f"set {variable} for this process only, or use a PIN file",
        )
    return kept


def _typed(name: str) -> str:
    with _KEEPING:
        kept = _KEPT.get(_PROMPT + name)
        if kept is None:
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("error", getpass.GetPassWarning)  # no terminal: a PIN would be read from anywhere
                    kept = getpass.getpass(f"PIN of {name}: ")
            except (EOFError, OSError, getpass.GetPassWarning):
                kept = ""
            if not kept:
                raise Misconfigured(
                    "token.pin_prompt", "no PIN was typed", remedy="start this at a terminal, or use a PIN file"
                )
            _KEPT[_PROMPT + name] = kept
    return kept


# -- a PIN that was refused is not tried again ------------------------------------------------------------------------


def require_not_refused_before(location: TokenLocation, pin: str) -> None:
    """Raises Misconfigured("token.pin_refused") if the token refused this very PIN before; other PINs may be tried.

    Tokens lock after a few wrong PINs. A supervisor that starts a failing service again and again would use them all up, so
    a refusal is remembered beside the PIN file, as a salted hash of the PIN, until the file holds another PIN.
    """
    mark = _mark(location)
    if mark is None:
        return
    try:
        said = json.loads(mark.read_text())
        salt, digest = bytes.fromhex(said["salt"]), bytes.fromhex(said["digest"])
    except FileNotFoundError:
        return
    except (OSError, ValueError, KeyError, TypeError):
        salt, digest = b"", b""  # unreadable: not knowing is no reason to use up a try
    if digest and not hmac.compare_digest(digest, _pin_digest(location, pin, salt)):
        return
    raise Misconfigured(
        "token.pin_refused",
        "the token refused this PIN before; it is not tried again, for tokens lock after a few wrong ones",
        expected=location.name,
        remedy=f"correct the PIN file; if it is right and the token was repaired, delete {mark}",
    )


def remember_refused(location: TokenLocation, pin: str) -> None:
    """Remember that the token refused this PIN."""
    mark = _mark(location)
    if mark is None:
        return
    salt = secrets.token_bytes(16)
    text = json.dumps({"salt": salt.hex(), "digest": _pin_digest(location, pin, salt).hex()})
    with contextlib.suppress(OSError):  # a read-only directory: the refusal itself is raised by the caller
        whole_files.replace(mark, text.encode(), mode=whole_files.PRIVATE)


def forget_refused(location: TokenLocation) -> None:
    """The PIN was taken."""
    mark = _mark(location)
    if mark is not None:
        mark.unlink(missing_ok=True)


def _mark(location: TokenLocation) -> Path | None:
    return None if location.pin_file is None else location.pin_file.with_name(location.pin_file.name + ".refused")


def _pin_digest(location: TokenLocation, pin: str, salt: bytes) -> bytes:
    return hashlib.pbkdf2_hmac("sha256", f"{location.name}\0{pin}".encode(), salt, _MARK_ROUNDS)
