"""SoftHSM2: where it is, and new tokens in a directory of their own."""

from __future__ import annotations

import os
import secrets
from pathlib import Path
from typing import Final

import pkcs11
from pkcs11.exceptions import PKCS11Error

from moorline.errors import Misconfigured, Unavailable
from moorline.hsm.token.location import TokenLocation
from moorline.hsm.token.module import Module

SOFTHSM_MODULES: Final = (
    "/usr/lib/softhsm/libsofthsm2.so",
    "/usr/lib/x86_64-linux-gnu/softhsm/libsofthsm2.so",
    "/usr/lib64/pkcs11/libsofthsm2.so",
)
_PIN_BYTES: Final = 16


def softhsm_module() -> str:
    """The path of SoftHSM's module on this machine; raises Misconfigured("token.softhsm_missing")."""
    for path in SOFTHSM_MODULES:
        if Path(path).exists():
            return path
    raise Misconfigured("token.softhsm_missing", "SoftHSM is not installed", remedy="apt-get install softhsm2")


def initialise_softhsm(directory: Path, *, label: str, so_pin: str | None = None) -> TokenLocation:
    """A new SoftHSM token in its own directory (0700) with random PINs; the user PIN is in `pin` (0600).

    Without `so_pin` the security officer's PIN is not kept: nobody resets this token, one makes another.
    """
    module = softhsm_module()
    directory = directory.resolve()
    tokens = directory / "tokens"
    for folder in (directory, tokens):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    configuration = directory / "softhsm2.conf"
    configuration.write_text(configuration_text(tokens))
    location = TokenLocation(
        module=module,
        label=label,
        pin_file=directory / "pin",
        environment={"SOFTHSM2_CONF": str(configuration)},
    )
    initialise_token(location, so_pin=so_pin)
    return location


def configuration_text(tokens: Path) -> str:
    """SoftHSM's configuration for a directory of tokens that only their owner reads."""
    return f"directories.tokendir = {tokens}\nobjectstore.backend = file\nobjectstore.umask = 0077\nlog.level = ERROR\n"


def location_in(directory: Path) -> TokenLocation:
    """The one token of a directory that `initialise_softhsm` made. Raises Misconfigured("token.no_directory")."""
    directory = directory.resolve()
    configuration, pin_file = directory / "softhsm2.conf", directory / "pin"
    if not configuration.exists() or not pin_file.exists():
        raise Misconfigured(
            "token.no_directory",
            "there is no token in this directory",
            expected=configuration,
            remedy="make one: moor hsm init --dir DIR",
        )
    environment = {"SOFTHSM2_CONF": str(configuration)}
    unnamed = TokenLocation(module=softhsm_module(), environment=environment)
    module = Module.enter(unnamed)
    try:
        with module.in_use():
            label = module.find(unnamed).label
    finally:
        module.leave()
    return TokenLocation(module=unnamed.module, label=label, pin_file=pin_file, environment=environment)


def initialise_token(location: TokenLocation, *, so_pin: str | None = None) -> str:
    """A new token in a free slot of a location's module, with a new user PIN in its (new) PIN file; the officer's PIN.

    PINs go from this process's memory into the module and nowhere else. Raises Misconfigured or Unavailable (`token.*`).
    """
    assert location.label is not None
    assert location.pin_file is not None
    officer = so_pin or secrets.token_hex(_PIN_BYTES)
    pin = new_pin_file(location.pin_file)
    module = Module.enter(location)
    try:
        with module.in_use():
            _require_label_free(module, location.label)
            module.native.init_token(module.free_slot(), officer, location.label)
            session = module.find(TokenLocation(module=location.module, label=location.label)).open(rw=True, so_pin=officer)
            try:
                session.init_pin(pin)
            finally:
                session.close()
    except PKCS11Error as error:
        location.pin_file.unlink(missing_ok=True)
        raise Unavailable("token.initialise", "the new token does not take its PIN", got=type(error).__name__) from None
    except BaseException:
        location.pin_file.unlink(missing_ok=True)
        raise
    finally:
        module.leave()
    return officer


def new_pin_file(path: Path) -> str:
    """A random PIN, in a new file of mode 0600. Raises Misconfigured("token.pin_file")."""
    pin = secrets.token_hex(_PIN_BYTES)
    try:
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as out:
            out.write(pin)
    except OSError as error:
        raise Misconfigured(
            "token.pin_file",
            "the PIN file cannot be made",
            expected=path,
            got=error.strerror,
            remedy="start with an empty directory",
        ) from None
    return pin


def _require_label_free(module: Module, label: str) -> None:
    for slot in module.library.get_slots(token_present=True):
        token = slot.get_token()
        if token.flags & pkcs11.TokenFlag.TOKEN_INITIALIZED and token.label == label:
            raise Misconfigured(
                "token.label_taken", "the module has a token of this label", got=label, remedy="choose another label"
            )
