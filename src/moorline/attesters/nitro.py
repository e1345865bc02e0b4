"""Attestation documents from AWS's Nitro Security Module (Linux: include/uapi/linux/nsm.h; aws-nitro-enclaves-nsm-api).

1. /dev/nsm takes one ioctl, NSM_IOCTL_RAW: address and length of a request, and of room for the answer; the kernel writes
   back how long the answer is. Both are CBOR. Mainline kernels ask for CAP_SYS_ADMIN.
2. The request is {"Attestation": {"user_data", "nonce", "public_key"}}, the answer {"Attestation": {"document"}}, or
   {"Error": "<word>"}.
3. What comes back is a document that holds what was asked: another answer is none.

Written from the kernel's header and tested against a module of our own behind the same structure; it was never run in an
enclave.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Final

from moorline.errors import Malformed, Unavailable
from moorline.evidence import eat_cbor
from moorline.evidence.nitro import parse_document
from moorline.wire import cbor

NSM_PATH: Final = Path("/dev/nsm")
NSM_IOCTL_RAW: Final = 3 << 30 | 32 << 16 | 0x0A << 8  # _IOWR(0x0A, 0, struct nsm_raw)
REQUEST_MAX: Final = 0x1000
RESPONSE_MAX: Final = 0x3000
_RAW: Final = struct.Struct("=4Q")  # struct nsm_raw: address and length of the request, of the response

Ioctl = Callable[[int, int, bytearray], object]
"""`fcntl.ioctl`: descriptor, request, the structure, which the kernel changes in place."""


def is_enclave(path: Path = NSM_PATH) -> bool:
    """True if there is a Nitro security module."""
    return path.exists()


def document(
    *,
    nonce: bytes,
    user_data: bytes,
    public_key: bytes | None = None,
    path: Path = NSM_PATH,
    ioctl: Ioctl = fcntl.ioctl,
) -> bytes:
    """A document about this very enclave, over what is given. Not verified here: it is evidence.

    Raises Unavailable("nitro.no_module" outside of an enclave, "nitro.module" if the module gives none, "nitro.contended" if
    it gives one over other values) and Malformed("nitro.request_size").
    """
    if not is_enclave(path):
        raise Unavailable("nitro.no_module", "this is no Nitro enclave", expected=path)
    request = cbor.encode({"Attestation": {"nonce": nonce, "public_key": public_key, "user_data": user_data}})
    if len(request) > REQUEST_MAX:
        raise Malformed(
            "nitro.request_size", "the request is too large", expected=f"<= {REQUEST_MAX} bytes", got=len(request)
        )
    found = _document(_asked(path, request, ioctl))
    try:
        parsed = parse_document(found)
    except Malformed as error:
        raise Unavailable("nitro.module", "what the security module gave is no document", got=error.code) from None
    if (parsed.nonce, parsed.user_data, parsed.public_key) != (nonce, user_data, public_key):
        raise Unavailable("nitro.contended", "the document is over other values than were asked for")
    return found


def _asked(path: Path, request: bytes, ioctl: Ioctl) -> bytes:
    """1. The buffers live until the kernel is done: they are local names here."""
    asked = ctypes.create_string_buffer(request, len(request))
    room = ctypes.create_string_buffer(RESPONSE_MAX)
    raw = bytearray(_RAW.pack(ctypes.addressof(asked), len(request), ctypes.addressof(room), RESPONSE_MAX))
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            ioctl(descriptor, NSM_IOCTL_RAW, raw)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise Unavailable(
            "nitro.module",
            "the security module gave no answer",
            got=errno.errorcode.get(error.errno or 0, type(error).__name__),
            remedy="run as root in the enclave: mainline kernels ask for CAP_SYS_ADMIN",
        ) from None
    size = _RAW.unpack(raw)[3]
    if size > RESPONSE_MAX:
        raise Unavailable("nitro.module", "the security module's answer is longer than its room", got=size)
    return room.raw[:size]


def _document(answer: bytes) -> bytes:
    """2."""
    try:
        item = eat_cbor.decode(answer, encoding=eat_cbor.Encoding.ANY)
    except Malformed as error:
        raise Unavailable("nitro.module", "the security module's answer cannot be read", got=error.code) from None
    attestation = item.get("Attestation") if isinstance(item, dict) else None
    found = attestation.get("document") if isinstance(attestation, dict) else None
    if not isinstance(found, bytes):
        word = item.get("Error") if isinstance(item, dict) else None
        raise Unavailable(
            "nitro.module", "the security module refused", got=word if isinstance(word, str) else "no document"
        )
    return found
