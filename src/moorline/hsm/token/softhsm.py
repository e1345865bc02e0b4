"""SoftHSM2: where it is, and new tokens in a directory of their own."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Final

import pkcs11
from pkcs11.exceptions import PKCS11Error

from moorline.errors import Misconfigured, Unavailable
from moorline.hsm.token.local import open_token
from moorline.hsm.token.location import TokenLocation
from moorline.hsm.token.module import Module
from moorline.hsm.token.native import LABEL_BYTES
from moorline.storage.steps import reached

SOFTHSM_MODULES: Final = (
    "/usr/lib/softhsm/libsofthsm2.so",
    "/usr/lib/x86_64-linux-gnu/softhsm/libsofthsm2.so",
    "/usr/lib64/pkcs11/libsofthsm2.so",
)
_PIN_BYTES: Final = 16
_LABEL_FILE: Final = "label"
_CONFIGURATION: Final = "softhsm2.conf"
_PIN_FILE: Final = "pin"


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
    require_label(label)
    directory = directory.resolve()
    require_unused(directory)
    tokens = directory / "tokens"
    for folder in (directory, tokens):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    configuration, named = directory / _CONFIGURATION, directory / _LABEL_FILE
    configuration.write_text(configuration_text(tokens))
    named.write_text(label, "utf-8")
    location = TokenLocation(
        module=module,
        label=label,
        pin_file=directory / _PIN_FILE,
        environment={"SOFTHSM2_CONF": str(configuration)},
    )
    try:
        initialise_token(location, so_pin=so_pin)
    except BaseException:
        for made in (configuration, named):
            made.unlink(missing_ok=True)
        raise
    return location


def require_unused(directory: Path) -> None:
    """Raises Misconfigured("token.directory_used") where a token was made, or begun: nothing of it is to be written over."""
    used = [name for name in (_LABEL_FILE, _CONFIGURATION, _PIN_FILE) if (directory / name).exists()]
    if used:
        raise Misconfigured(
            "token.directory_used",
            "a token was made or begun in this directory; it is left as it is",
            expected="a directory without a token",
            got=f"{directory} with {', '.join(used)}",
            remedy="choose another directory; moor hsm inspect --dir shows what is in this one",
        )


def require_label(label: str) -> None:
    """Raises Misconfigured("token.label") unless a token can be called this, and be told apart by it (CK_TOKEN_INFO)."""
    if not label.strip() or label != label.strip() or len(label.encode("utf-8")) > LABEL_BYTES:
        raise Misconfigured(
            "token.label",
            "a token's label is 1 to 32 bytes, without blanks around it",
            expected=f"1 to {LABEL_BYTES} bytes of UTF-8",
            got=repr(label),
            remedy="choose another label",
        )


def configuration_text(tokens: Path) -> str:
    """SoftHSM's configuration for a directory of tokens that only their owner reads."""
    return f"directories.tokendir = {tokens}\nobjectstore.backend = file\nobjectstore.umask = 0077\nlog.level = ERROR\n"


def location_in(directory: Path) -> TokenLocation:
    """The one token of a directory that `initialise_softhsm` made. Raises Misconfigured("token.no_directory")."""
    directory = directory.resolve()
    configuration, pin_file = directory / _CONFIGURATION, directory / _PIN_FILE
    if not configuration.exists() or not pin_file.exists():
        raise Misconfigured(
            "token.no_directory",
            "there is no token in this directory",
            expected=configuration,
            remedy="make one: moor hsm init --dir DIR",
        )
    environment = {"SOFTHSM2_CONF": str(configuration)}
    with contextlib.suppress(OSError):  # directories of before have one token, and no such file
        label = (directory / _LABEL_FILE).read_text("utf-8")
        return TokenLocation(module=softhsm_module(), label=label, pin_file=pin_file, environment=environment)
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
    require_label(location.label)
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


def set_pin(location: TokenLocation) -> None:
    """A new random user PIN. The new one is on disk before the token has it, and takes the old one's place afterwards.

    Nobody else has the token open. Whoever dies in between calls `finish_pin` at the next start.
    """
    assert location.pin_file is not None
    beside = _next_pin(location.pin_file)
    beside.unlink(missing_ok=True)
    pin = new_pin_file(beside)
    reached("hsm.pin.beside")
    module = Module.enter(location)
    try:
        with module.in_use():
            session = module.find(location).open(rw=True, user_pin=location.pin())
            try:
                session.set_pin(location.pin(), pin)
            finally:
                session.close()
    except PKCS11Error as error:
        raise Unavailable("token.failed", "the token does not take a new PIN", got=type(error).__name__) from None
    finally:
        module.leave()
    reached("hsm.pin.set")
    beside.rename(location.pin_file)


def finish_pin(location: TokenLocation) -> None:
    """Settle which PIN counts after a process died in `set_pin`: the new one is tried once, else the old one stays."""
    assert location.pin_file is not None
    beside = _next_pin(location.pin_file)
    if not beside.exists():
        return
    try:
        open_token(replace(location, pin_file=beside), lanes=1).close()
    except Misconfigured as error:
        if error.code != "token.pin_refused":
            raise
        beside.unlink()
        beside.with_name(beside.name + ".refused").unlink(missing_ok=True)
        return
    beside.rename(location.pin_file)


def _next_pin(path: Path) -> Path:
    return path.with_name(path.name + ".next")


def remove_token(base: TokenLocation, label: str) -> bool:
    """Remove the SoftHSM token of this label, files and all; whether the module still lists it afterwards.

    The module is restarted meanwhile: it would fail for every token when one of its directories is gone.
    Raises Unavailable("token.not_removed") where that is not possible from here.
    """
    configuration = base.environment.get("SOFTHSM2_CONF")
    if configuration is None:
        raise Unavailable(
            "token.not_removed",
            "only SoftHSM's tokens can be removed from here; the objects in it are destroyed",
            expected=base.module,
            remedy="remove the partition with the vendor's tool, then destroy the tenant again",
        )
    tokens = Path(configuration).parent / "tokens"
    module = Module.enter(base)
    try:
        with module.in_use():
            serials = [each.serial.decode("ascii").strip() for each in module.tokens() if each.label == label]
        with module.restarted():
            for serial in serials:
                for folder in tokens.iterdir():
                    if folder.name.replace("-", "").endswith(serial):
                        _shred(folder)
        with module.in_use():
            return any(each.label == label for each in module.tokens())
    finally:
        module.leave()


def is_listed(base: TokenLocation, label: str) -> bool:
    """Whether the module shows a token of this label."""
    module = Module.enter(base)
    try:
        with module.in_use():
            return any(each.label == label for each in module.tokens())
    except PKCS11Error as error:
        raise Unavailable("token.gone", "the module cannot see its tokens", got=type(error).__name__) from None
    finally:
        module.leave()


def _shred(folder: Path) -> None:
    """Overwrite and unlink what the module left, the token's own file above all.

    What a copy-on-write or flash medium keeps of it is not ours to say.
    """
    for file in folder.iterdir():
        size = file.stat().st_size
        with file.open("r+b") as out:
            out.write(bytes(size))
            out.flush()
            os.fsync(out.fileno())
    shutil.rmtree(folder)
