"""The few PKCS#11 calls that python-pkcs11 does not offer: initialisation for threads, and of tokens.

`C_InitToken` takes the security officer's PIN as a pointer to memory of this process. A command line tool would take it as
an argument, which every user of the machine can read in /proc; so no tool is called.

Functions are taken from the list that `C_GetFunctionList` gives out, the only symbol a module must export (PKCS#11 3.0,
5.4).
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Final

from moorline.errors import Misconfigured, Unavailable

_OS_LOCKING_OK: Final = 2
_ALREADY_INITIALIZED: Final = 0x191
LABEL_BYTES: Final = 32
_POINTER: Final = ctypes.sizeof(ctypes.c_void_p)
# Positions in CK_FUNCTION_LIST (PKCS#11 3.0, pkcs11t.h): behind the version come the functions, in this order since 2.0.
_INITIALIZE: Final = 0
_FINALIZE: Final = 1
_INIT_TOKEN: Final = 9
_LOGOUT: Final = 19


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


class NativeModule:
    """A loaded module's own functions. Raises Misconfigured("token.module") if it cannot be loaded."""

    def __init__(self, path: str) -> None:
        try:
            self._library = ctypes.CDLL(path)
            listed = ctypes.c_void_p()
            outcome = self._library.C_GetFunctionList(ctypes.byref(listed))
        except (OSError, AttributeError) as error:
            raise Misconfigured(
                "token.module",
                "the PKCS#11 module could not be loaded",
                expected=path,
                got=error,
                remedy="install softhsm2, or name your HSM's module in token_module",
            ) from None
        if outcome != 0 or not listed.value:
            raise Misconfigured(
                "token.module",
                "this library is no PKCS#11 module",
                expected=path,
                got=hex(outcome),
                remedy="name your HSM's module, a .so file of its vendor",
            )
        self._functions = listed.value + _POINTER  # CK_VERSION is two bytes, padded to a pointer

    def _call(self, position: int, signature: Callable[[int], Callable[..., int]], *arguments: object) -> int:
        address = ctypes.c_void_p.from_address(self._functions + position * _POINTER).value
        assert address is not None
        return signature(address)(*arguments)

    def finalize(self) -> None:
        """Close everything the module has open in this process."""
        self._call(_FINALIZE, ctypes.CFUNCTYPE(ctypes.c_ulong, ctypes.c_void_p), None)

    def initialize_for_threads(self) -> None:
        """C_Initialize with CKF_OS_LOCKING_OK. Raises Misconfigured("token.module")."""
        arguments = _InitializeArgs(flags=_OS_LOCKING_OK)
        signature = ctypes.CFUNCTYPE(ctypes.c_ulong, ctypes.c_void_p)
        outcome = self._call(_INITIALIZE, signature, ctypes.byref(arguments))
        if outcome not in (0, _ALREADY_INITIALIZED):
            raise Misconfigured("token.module", "the PKCS#11 module refuses to work with threads", got=hex(outcome))

    def logout(self, session: int) -> None:
        """C_Logout: nobody is logged in any more, and private session objects are gone; public ones stay."""
        outcome = self._call(_LOGOUT, ctypes.CFUNCTYPE(ctypes.c_ulong, ctypes.c_ulong), session)
        if outcome != 0:
            raise Unavailable("token.failed", "the token does not log out", got=hex(outcome))

    def init_token(self, slot: int, so_pin: str, label: str) -> None:
        """C_InitToken: make (or wipe) the token in a slot; `label` is LABEL_BYTES at most.

        Raises Unavailable("token.initialise").
        """
        pin = so_pin.encode("utf-8")
        padded = label.encode("utf-8").ljust(LABEL_BYTES)
        signature = ctypes.CFUNCTYPE(ctypes.c_ulong, ctypes.c_ulong, ctypes.c_char_p, ctypes.c_ulong, ctypes.c_char_p)
        outcome = self._call(_INIT_TOKEN, signature, slot, pin, len(pin), padded)
        if outcome != 0:
            raise Unavailable(
                "token.initialise",
                "the module could not make a token",
                got=hex(outcome),
                remedy="see that the token directory is writable and has space, or that the slot is free",
            )
