"""The Linux IMA measurement list in its ASCII form, templates ima-ng, ima-sig and ima-buf.

One line an entry: `<pcr> <template hash> <template> <algorithm>:<digest> <path>[ <signature or buffer>]`. The kernel writes
spaces in a path as underscores, but lists seen elsewhere contain spaces, so everything between digest and signature is the
path, whatever bytes it holds. The list is untrusted until it replays to a quoted PCR 10 (verification.ima). Parsing is
total; failures are Malformed (`ima.*`).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final

from moorline.errors import Malformed

PCR: Final = 10
MAX_LIST: Final = 4 << 20
MAX_PATH: Final = 4096
_MAX_LINE: Final = 16384
_MAX_EXTRA: Final = 4096
_DIGEST_SIZES: Final = {b"md5": 16, b"sha1": 20, b"sha256": 32, b"sha384": 48, b"sha512": 64, b"sm3_256": 32}
_TEMPLATE_HASH_SIZES: Final = (20, 32)
_PLAIN: Final = b"ima-ng"
_WITH_EXTRA: Final = (b"ima-sig", b"ima-buf")
_LENGTH: Final = struct.Struct("<I")


@dataclass(frozen=True, slots=True)
class ImaEntry:
    """One measured file, as the line says. `extra` is a file signature (ima-sig) or a buffer (ima-buf), possibly empty.

    A violation is an entry whose template hash is all zeros: the kernel saw a file open for writing while it was measured
    (ToMToU or open writers) and extended 0xff bytes instead.
    """

    pcr: int
    template_hash: bytes
    template: str
    algorithm: str
    digest: bytes
    path: bytes
    extra: bytes

    @property
    def violation(self) -> bool:
        """True if this entry marks a measurement violation."""
        return not any(self.template_hash)

    def template_data(self) -> bytes:
        """What the template hash covers (kernel: ima_calc_field_array_hash)."""
        named = f"{self.algorithm}:".encode("ascii") + b"\x00" + self.digest
        fields = [named, self.path + b"\x00"]
        if self.template != "ima-ng":
            fields.append(self.extra)
        return b"".join(_LENGTH.pack(len(field)) + field for field in fields)


def split_lines(data: bytes) -> list[bytes]:
    """The lines of a list, each without its end. Raises Malformed("ima.too_large" | "ima.truncated")."""
    if len(data) > MAX_LIST:
        raise Malformed("ima.too_large", "the IMA list is too large", expected=f"<= {MAX_LIST} bytes", got=len(data))
    if not data:
        return []
    if not data.endswith(b"\n"):
        raise Malformed("ima.truncated", "the IMA list ends inside a line")
    return data[:-1].split(b"\n")


def parse_ima(data: bytes) -> tuple[ImaEntry, ...]:
    """All entries of a list from untrusted bytes; raises only Malformed (`ima.*`)."""
    return tuple(parse_line(line) for line in split_lines(data))


def parse_line(line: bytes) -> ImaEntry:
    """One entry from its line, without the line end; raises only Malformed (`ima.*`)."""
    if len(line) > _MAX_LINE:
        raise Malformed("ima.too_large", "a line of the IMA list is too long", expected=f"<= {_MAX_LINE}", got=len(line))
    fields = line.split(b" ", 4)
    if len(fields) != 5:
        raise Malformed("ima.line", "not a line of an IMA list", expected="pcr hash template digest path", got=len(fields))
    pcr, template_hash, template, named_digest, rest = fields
    if not (pcr.isdigit() and len(pcr) <= 2):
        raise Malformed("ima.line", "an entry names no PCR", got=pcr[:16])
    measured = _hex(template_hash)
    if len(measured) not in _TEMPLATE_HASH_SIZES:
        raise Malformed("ima.line", "a template hash has the wrong length", got=len(measured))
    algorithm, digest = _digest(named_digest, violation=not any(measured))
    if template == _PLAIN:
        path, extra = rest, b""
    elif template in _WITH_EXTRA:
        path, extra = _path_and_extra(rest)
    else:
        raise Malformed("ima.template_unknown", "a template that is not read here", got=template[:32])
    if not path or len(path) > MAX_PATH or b"\x00" in path:
        raise Malformed("ima.path", "a path is empty, too long or holds a zero byte", got=len(path))
    return ImaEntry(int(pcr), measured, template.decode("ascii"), algorithm, digest, path, extra)


def _digest(named: bytes, *, violation: bool) -> tuple[str, bytes]:
    algorithm, separator, text = named.partition(b":")
    size = _DIGEST_SIZES.get(algorithm)
    if not separator or size is None:
        raise Malformed("ima.algorithm_unknown", "the digest of a file names no known hash", got=algorithm[:32])
    digest = _hex(text)
    if len(digest) != size and not violation:
        raise Malformed("ima.line", "a file digest has the wrong length", expected=size, got=len(digest))
    return algorithm.decode("ascii"), digest


def _path_and_extra(rest: bytes) -> tuple[bytes, bytes]:
    """An ima-sig line always ends in a space and the signature, which may be empty."""
    path, separator, text = rest.rpartition(b" ")
    if not separator:
        raise Malformed("ima.line", "an entry lacks its signature field")
    extra = _hex(text)
    if len(extra) > _MAX_EXTRA:
        raise Malformed("ima.line", "a signature or buffer is too long", expected=f"<= {_MAX_EXTRA}", got=len(extra))
    return path, extra


def _hex(text: bytes) -> bytes:
    try:
        value = bytes.fromhex(text.decode("ascii"))
    except ValueError:
        value = None
    if value is None or value.hex().encode("ascii") != text:
        raise Malformed("ima.line", "not lower-case hexadecimal", got=text[:64])
    return value
