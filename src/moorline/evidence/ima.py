"""The Linux IMA measurement list, in its ASCII and its binary form, every template of the kernel up to ima-sigv2.

| template   | fields in the template data (security/integrity/ima/ima_template.c)          |
|------------|------------------------------------------------------------------------------|
| ima        | digest without its algorithm; name, in 256 bytes when it is hashed           |
| ima-ng     | `<algorithm>:` NUL digest; path NUL                                          |
| ima-ngv2   | `<ima or verity>:<algorithm>:` NUL digest; path NUL                          |
| ima-sig    | as ima-ng; signature                                                         |
| ima-sigv2  | as ima-ngv2; signature                                                       |
| ima-buf    | as ima-ng; buffer                                                            |
| ima-modsig | as ima-ng; signature; digest without the appended signature; that signature  |

A line is `<pcr> <template hash> <template> <digest> <path>[ <further fields>]`; an empty field leaves its space. The kernel
writes spaces in a path as underscores, but lists seen elsewhere contain spaces, so everything between digest and further
fields is the path, whatever bytes it holds: a path is bytes, and nobody decodes it here. The list is untrusted until it
replays to a quoted PCR 10 (verification.ima). Parsing is total; failures are Malformed (`ima.*`), and what was read can be
written back to the same bytes.
"""

from __future__ import annotations

import struct
from binascii import unhexlify
from typing import Final, NamedTuple

from moorline.errors import Malformed

PCR: Final = 10
MAX_LIST: Final = 4 << 20
MAX_PATH: Final = 4096
_MAX_LINE: Final = 16384
_MAX_EXTRA: Final = 4096
_NAME_SPACE: Final = 256  # IMA_EVENT_NAME_LEN_MAX + 1
DIGEST_SIZES: Final = {"md5": 16, "sha1": 20, "sha256": 32, "sha384": 48, "sha512": 64, "sm3_256": 32}
_TEMPLATE_HASH_SIZES: Final = (20, 32, 48, 64)
_DIGEST_TYPES: Final = ("ima", "verity")
_TYPED: Final = ("ima-ngv2", "ima-sigv2")
_EXTRAS: Final = {"ima": 0, "ima-ng": 0, "ima-ngv2": 0, "ima-sig": 1, "ima-sigv2": 1, "ima-buf": 1, "ima-modsig": 3}
_ONE_FIELD: Final = frozenset(name for name, count in _EXTRAS.items() if count == 1)
TEMPLATES: Final = tuple(_EXTRAS)
_TEMPLATE_NAMES: Final = {name.encode("ascii"): name for name in _EXTRAS}
_ALGORITHM_NAMES: Final = {name.encode("ascii"): name for name in DIGEST_SIZES}
_NOT_APPENDED: Final = ("", b"", b"")
_LENGTH: Final = struct.Struct("<I")
_LENGTHS: Final = tuple(_LENGTH.pack(size) for size in range(_MAX_EXTRA + 2))  # a path ends in a zero byte
_HEADS: Final = {
    (kind, name): (f"{kind}:{name}:" if kind else f"{name}:").encode("ascii") + b"\x00"
    for name in DIGEST_SIZES
    for kind in ("", *_DIGEST_TYPES)
}


class ImaEntry(NamedTuple):
    """One measured file, as the list says. `extra` is a file signature or a buffer (ima-buf), possibly empty.

    `digest_type` is `ima` or `verity` in the v2 templates and empty in the others: under `verity` the digest is the file's
    fs-verity digest and not that of its contents. `appended_*` are those of ima-modsig, empty where there is none.

    A violation is an entry whose template hash is all zeros: the kernel saw a file open for writing while it was measured
    (ToMToU or open writers) and extended 0xff bytes instead. (A named tuple: lists are long, and a frozen dataclass takes
    four times as long to make.)
    """

    pcr: int
    template_hash: bytes
    template: str
    algorithm: str
    digest: bytes
    path: bytes
    extra: bytes
    digest_type: str = ""
    appended_algorithm: str = ""
    appended_digest: bytes = b""
    appended_signature: bytes = b""

    @property
    def violation(self) -> bool:
        """True if this entry marks a measurement violation."""
        return not self.template_hash.strip(b"\x00")

    def fields(self) -> tuple[bytes, ...]:
        """The fields of the template data after the path, without their lengths."""
        if self.template != "ima-modsig":
            return (self.extra,) if _EXTRAS[self.template] else ()
        named = _named("", self.appended_algorithm, self.appended_digest) if self.appended_algorithm else b""
        return (self.extra, named, self.appended_signature)

    def template_data(self) -> bytes:
        """What the template hash covers (kernel: ima_calc_field_array_hash)."""
        if self.template == "ima":
            return self.digest + self.path.ljust(_NAME_SPACE, b"\x00")
        return _with_lengths(self)


def split_lines(data: bytes) -> list[bytes]:
    """The lines of a list, each without its end. Raises Malformed("ima.too_large" | "ima.truncated")."""
    _bounded(data)
    if not data:
        return []
    if not data.endswith(b"\n"):
        raise Malformed("ima.truncated", "the IMA list ends inside a line")
    return data[:-1].split(b"\n")


def parse_ima(data: bytes) -> tuple[ImaEntry, ...]:
    """All entries of an ASCII list from untrusted bytes; raises only Malformed (`ima.*`)."""
    return tuple(parse_line(line) for line in split_lines(data))


def parse_line(line: bytes) -> ImaEntry:
    """One entry from its line, without the line end; raises only Malformed (`ima.*`)."""
    if len(line) > _MAX_LINE:
        raise Malformed("ima.too_large", "a line of the IMA list is too long", expected=f"<= {_MAX_LINE}", got=len(line))
    fields = line.split(b" ", 4)
    if len(fields) != 5:
        raise Malformed("ima.line", "not a line of an IMA list", expected="pcr hash template digest path", got=len(fields))
    pcr, template_hash, template, named_digest, rest = fields
    measured = _hex(template_hash)
    if len(measured) not in _TEMPLATE_HASH_SIZES:
        raise Malformed("ima.line", "a template hash has the wrong length", got=len(measured))
    index = PCR if pcr == b"10" else _index(pcr)
    name = _TEMPLATE_NAMES.get(template) or _template(template)
    if name != "ima-sig" and name != "ima-ng":  # noqa: PLR1714 - a set is slower, and these two are nearly all there are
        kind, algorithm, digest = _shown_digest(named_digest, name, violation=not measured.strip(b"\x00"))
        path, extra, appended = _path_and_fields(rest, name)
        return ImaEntry(index, measured, name, algorithm, digest, _path(path), extra, kind, *appended)
    named, separator, value = named_digest.partition(b":")
    algorithm = (_ALGORITHM_NAMES.get(named) if separator else None) or _algorithm(named if separator else b"")
    digest = _hex(value)
    if len(digest) != DIGEST_SIZES[algorithm]:
        _sized(algorithm, digest, violation=not measured.strip(b"\x00"))
    if name == "ima-ng":
        return ImaEntry(index, measured, name, algorithm, digest, _path(rest), b"")
    path, separator, shown = rest.rpartition(b" ")
    if not separator:
        raise Malformed("ima.line", "an entry lacks fields of its template", expected=1, got=0)
    signature = _hex(shown)
    if not path or len(path) > MAX_PATH or b"\x00" in path or len(signature) > _MAX_EXTRA:
        _path(path), _capped(signature)
    return ImaEntry(index, measured, name, algorithm, digest, path, signature)


def serialize_line(entry: ImaEntry) -> bytes:
    """The line of an entry, without the line end: `serialize_line(parse_line(b)) == b`."""
    kind = f"{entry.digest_type}:" if entry.digest_type else ""
    named = kind if entry.template == "ima" else f"{kind}{entry.algorithm}:"
    head = f"{entry.pcr} {entry.template_hash.hex()} {entry.template} {named}{entry.digest.hex()} "
    return head.encode("ascii") + b" ".join([entry.path, *_shown_fields(entry)])


def parse_binary(data: bytes) -> tuple[ImaEntry, ...]:
    """All entries of a binary list (binary_runtime_measurements*, little endian) from untrusted bytes.

    Which hash made the template hashes is said nowhere in it: SHA-1 is tried, then the wider ones, and the list must be used
    up exactly. Raises only Malformed (`ima.*`), that of the SHA-1 reading if none fits.
    """
    _bounded(data)
    first: Malformed | None = None
    for width in _TEMPLATE_HASH_SIZES:
        try:
            return _binary(data, width)
        except Malformed as error:
            first = first or error
    raise first or Malformed("ima.truncated", "not a binary IMA list")


def serialize_binary(entries: tuple[ImaEntry, ...]) -> bytes:
    """The binary list of entries: `serialize_binary(parse_binary(b)) == b`."""
    made: list[bytes] = []
    for entry in entries:
        name = entry.template.encode("ascii")
        made += [_LENGTH.pack(entry.pcr), entry.template_hash, _LENGTH.pack(len(name)), name]
        if entry.template == "ima":
            made += [entry.digest, _LENGTH.pack(len(entry.path)), entry.path]
        else:
            template_data = _with_lengths(entry)
            made += [_LENGTH.pack(len(template_data)), template_data]
    return b"".join(made)


# ASCII -----------------------------------------------------------------------------------------------------------------


def _index(pcr: bytes) -> int:
    if not (pcr.isdigit() and len(pcr) <= 2) or (pcr.startswith(b"0") and len(pcr) == 2):
        raise Malformed("ima.line", "an entry names no PCR", got=pcr[:16])
    return int(pcr)


def _shown_digest(text: bytes, template: str, *, violation: bool) -> tuple[str, str, bytes]:
    """Type, algorithm and value of a digest in a line."""
    if template == "ima":
        return "", *_sized("sha1", _hex(text), violation=False)
    kind = ""
    if template in _TYPED:
        head, separator, text = text.partition(b":")
        kind = _digest_type(head if separator else b"")
    algorithm, separator, value = text.partition(b":")
    return kind, *_sized(_algorithm(algorithm if separator else b""), _hex(value), violation=violation)


def _path_and_fields(rest: bytes, template: str) -> tuple[bytes, bytes, tuple[str, bytes, bytes]]:
    """Path, first further field, and the appended signature of ima-modsig: each field has its space, even if empty."""
    count = _EXTRAS[template]
    path, *fields = rest.rsplit(b" ", count) if count else (rest,)
    if len(fields) != count:
        raise Malformed("ima.line", "an entry lacks fields of its template", expected=count, got=len(fields))
    if not count:
        return path, b"", _NOT_APPENDED
    extra = _capped(_hex(fields[0]))
    if count == 1:
        return path, extra, _NOT_APPENDED
    algorithm, digest = "", b""
    if fields[1]:
        named, separator, value = fields[1].partition(b":")
        algorithm, digest = _sized(_algorithm(named if separator else b""), _hex(value), violation=False)
    return path, extra, (algorithm, digest, _capped(_hex(fields[2])))


def _shown_fields(entry: ImaEntry) -> list[bytes]:
    if entry.template != "ima-modsig":
        return [field.hex().encode("ascii") for field in entry.fields()]
    appended = f"{entry.appended_algorithm}:{entry.appended_digest.hex()}" if entry.appended_algorithm else ""
    return [one.encode("ascii") for one in (entry.extra.hex(), appended, entry.appended_signature.hex())]


def _hex(text: bytes) -> bytes:
    try:
        value = unhexlify(text)
    except ValueError:
        value = None
    if value is None or text.lower() != text:
        raise Malformed("ima.line", "not lower-case hexadecimal", got=text[:64])
    return value


# Binary ----------------------------------------------------------------------------------------------------------------


def _binary(data: bytes, width: int) -> tuple[ImaEntry, ...]:
    entries: list[ImaEntry] = []
    at = 0
    while at < len(data):
        entry, at = _binary_entry(data, at, width)
        entries.append(entry)
    return tuple(entries)


def _binary_entry(data: bytes, at: int, width: int) -> tuple[ImaEntry, int]:
    pcr, at = _number(data, at)
    measured, at = _take(data, at, width)
    length, at = _number(data, at)
    named, at = _take(data, at, min(length, 32))
    template = _template(named)
    if pcr > 99:
        raise Malformed("ima.line", "an entry names no PCR", got=pcr)
    violation = not measured.strip(b"\x00")
    if template == "ima":
        digest, at = _take(data, at, DIGEST_SIZES["sha1"])
        length, at = _number(data, at)
        path, at = _take(data, at, length)
        return ImaEntry(pcr, measured, template, "sha1", digest, _path(path), b""), at
    length, at = _number(data, at)
    body, at = _take(data, at, length)
    fields = _fields(body)
    if len(fields) != 2 + _EXTRAS[template]:
        raise Malformed("ima.line", "an entry lacks fields of its template, or has more", got=len(fields))
    kind, algorithm, digest = _named_digest(fields[0], template, violation=violation)
    if not fields[1].endswith(b"\x00"):
        raise Malformed("ima.path", "a path does not end in a zero byte")
    extra = _capped(fields[2]) if len(fields) > 2 else b""
    appended: tuple[str, bytes, bytes] = _NOT_APPENDED
    if len(fields) == 5:
        named_appended = _named_digest(fields[3], "", violation=False)[1:] if fields[3] else ("", b"")
        appended = (*named_appended, _capped(fields[4]))
    return ImaEntry(pcr, measured, template, algorithm, digest, _path(fields[1][:-1]), extra, kind, *appended), at


def _named_digest(field: bytes, template: str, *, violation: bool) -> tuple[str, str, bytes]:
    names, separator, digest = field.partition(b":\x00")
    if not separator:
        raise Malformed("ima.algorithm_unknown", "the digest of a file names no known hash", got=field[:32])
    kind = ""
    if template in _TYPED:
        head, separator, names = names.partition(b":")
        kind = _digest_type(head if separator else b"")
    return kind, *_sized(_algorithm(names), digest, violation=violation)


def _fields(body: bytes) -> list[bytes]:
    fields: list[bytes] = []
    at = 0
    while at < len(body):
        if len(fields) == 5:
            raise Malformed("ima.line", "an entry has more fields than any template")
        length, at = _number(body, at)
        field, at = _take(body, at, length)
        fields.append(field)
    return fields


def _number(data: bytes, at: int) -> tuple[int, int]:
    taken, end = _take(data, at, _LENGTH.size)
    number: int = _LENGTH.unpack(taken)[0]
    return number, end


def _take(data: bytes, at: int, size: int) -> tuple[bytes, int]:
    if size > len(data) - at:
        raise Malformed("ima.truncated", "the IMA list ends inside an entry", got=f"entry at byte {at}")
    return data[at : at + size], at + size


# Both ------------------------------------------------------------------------------------------------------------------


def _with_lengths(entry: ImaEntry) -> bytes:
    named = _HEADS[entry.digest_type, entry.algorithm] + entry.digest
    path = entry.path + b"\x00"
    extra = entry.extra
    if entry.template in _ONE_FIELD and len(path) < len(_LENGTHS) > len(extra):  # the same as below, without the loop
        return b"".join((_LENGTHS[len(named)], named, _LENGTHS[len(path)], path, _LENGTHS[len(extra)], extra))
    head = _sized_in(named) + named + _sized_in(path) + path
    for field in entry.fields():
        head += _sized_in(field) + field
    return head


def _sized_in(field: bytes) -> bytes:
    size = len(field)
    return _LENGTHS[size] if size < len(_LENGTHS) else _LENGTH.pack(size)


def _named(kind: str, algorithm: str, digest: bytes) -> bytes:
    return _HEADS[kind, algorithm] + digest


def _bounded(data: bytes) -> None:
    if len(data) > MAX_LIST:
        raise Malformed("ima.too_large", "the IMA list is too large", expected=f"<= {MAX_LIST} bytes", got=len(data))


def _template(named: bytes) -> str:
    name = _TEMPLATE_NAMES.get(named)
    if name is None:
        raise Malformed("ima.template_unknown", "a template that is not read here", got=named[:32])
    return name


def _algorithm(named: bytes) -> str:
    name = _ALGORITHM_NAMES.get(named)
    if name is None:
        raise Malformed("ima.algorithm_unknown", "the digest of a file names no known hash", got=named[:32])
    return name


def _digest_type(named: bytes) -> str:
    name = named.decode("ascii", "replace")
    if name not in _DIGEST_TYPES:
        raise Malformed(
            "ima.digest_type", "a digest is of no known type", expected=" or ".join(_DIGEST_TYPES), got=named[:16]
        )
    return name


def _sized(algorithm: str, digest: bytes, *, violation: bool) -> tuple[str, bytes]:
    """A violation says nothing about the file, and kernels differ in how many zeros they write."""
    if len(digest) != DIGEST_SIZES[algorithm] and not violation:
        raise Malformed("ima.line", "a file digest has the wrong length", expected=DIGEST_SIZES[algorithm], got=len(digest))
    return algorithm, digest


def _path(path: bytes) -> bytes:
    if not path or len(path) > MAX_PATH or b"\x00" in path:
        raise Malformed("ima.path", "a path is empty, too long or holds a zero byte", got=len(path))
    return path


def _capped(extra: bytes) -> bytes:
    if len(extra) > _MAX_EXTRA:
        raise Malformed("ima.line", "a signature or buffer is too long", expected=f"<= {_MAX_EXTRA}", got=len(extra))
    return extra
