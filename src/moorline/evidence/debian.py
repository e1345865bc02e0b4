"""Debian binary packages (deb(5)) from untrusted bytes: what each installed file hashes to. Nothing is written anywhere.

1. The outer archive is `ar`: exactly debian-binary "2.x", control.tar and data.tar, in this order; names that begin with `_`
   may stand behind (deb(5)), anything else is refused.
2. control.tar and data.tar are plain, gz, xz or zst, unpacked piece by piece and never whole; the total is capped, and so is
   the number of files. (The standard library has no zst: the caller hands in what unpacks it.)
3. Paths are those the package installs: no `..`, no empty part, UTF-8, each once. A path below /bin, /sbin and /lib* is also
   the path below /usr, since IMA names a file where it lies on a merged /usr.
4. Regular files are hashed as they pass; a hard link has the digest of its target, which has to stand before it. Symbolic
   links, directories and devices are no files that are measured. Sparse and other odd entries are refused.

It does not establish who made the package: see `debian_index`. It does not see what maintainer scripts make on the host.
"""

from __future__ import annotations

import hashlib
import lzma
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

from moorline.errors import Malformed

MAX_PACKAGE: Final = 1 << 30
MAX_UNPACKED: Final = 8 << 30
MAX_RATIO: Final = 400
_RATIO_FROM: Final = 64 << 20
MAX_FILES: Final = 200_000
_MAX_PATH: Final = 4096
_MAX_CONTROL: Final = 1 << 20
_XZ_MEMORY: Final = 256 << 20
_PIECE: Final = 1 << 18
_MAGIC: Final = b"!<arch>\n"
_BLOCK: Final = 512
_MERGED: Final = re.compile(r"^/(bin|sbin|lib|lib32|lib64|libx32)/")
_FIELD: Final = re.compile(r"^(Package|Version|Architecture):[ \t]*(\S[^\r\n]*?)[ \t]*$", re.MULTILINE)
_WORD: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9+.~:-]{0,199}")
HASHES: Final = ("sha256", "sha384", "sha512", "sha1")

Unpack = Callable[[bytes], Iterator[bytes]]
"""The contents of a zst stream, piece by piece; raises Malformed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DebianFile:
    """One installed file. `executable` is whether anybody may execute it."""

    digest: bytes
    size: int
    executable: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class DebianPackage:
    """A package and the files it installs, by absolute path. `sha256` is that of the whole .deb, for signed indexes."""

    name: str
    version: str
    architecture: str
    sha256: bytes
    files: dict[str, DebianFile]

    @property
    def identity(self) -> str:
        """Name, version and architecture, as dpkg writes them."""
        return f"{self.name}_{self.version}_{self.architecture}"


def parse_deb(data: bytes, *, algorithm: str = "sha256", unzstd: Unpack | None = None) -> DebianPackage:
    """The package in `data`; raises only Malformed (`deb.*`). `algorithm` is the one IMA measures with."""
    if len(data) > MAX_PACKAGE:
        raise Malformed("deb.too_large", "the package is too large", expected=f"<= {MAX_PACKAGE} bytes", got=len(data))
    if algorithm not in HASHES:
        raise Malformed("deb.algorithm", "no such hash of IMA", expected=", ".join(HASHES), got=algorithm)
    members = _members(data)
    control = _control(_unpacked(*members["control.tar"], unzstd))
    return DebianPackage(
        name=control["Package"],
        version=control["Version"],
        architecture=control["Architecture"],
        sha256=hashlib.sha256(data).digest(),
        files=_files(_unpacked(*members["data.tar"], unzstd), algorithm),
    )


def also_at(path: str) -> tuple[str, ...]:
    """The paths at which an installed file can be measured: its own, and that on a merged /usr."""
    return (path, f"/usr{path}") if _MERGED.match(path) else (path,)


def _members(data: bytes) -> dict[str, tuple[str, bytes]]:
    """`control.tar` and `data.tar`: compression and bytes."""
    if not data.startswith(_MAGIC):
        raise Malformed("deb.archive", "not a Debian package", expected="an ar archive")
    at, found = len(_MAGIC), []
    while at < len(data):
        header = data[at : at + 60]
        if len(header) != 60 or header[58:] != b"`\n":
            raise Malformed("deb.archive", "a member of the archive has no header", got=at)
        name = header[:16].rstrip(b" ").removesuffix(b"/").decode("ascii", "replace")
        size = _decimal(header[48:58])
        body = data[at + 60 : at + 60 + size]
        if len(body) != size:
            raise Malformed("deb.truncated", "the archive ends inside a member", got=name)
        found.append((name, body))
        at += 60 + size + (size & 1)
        if len(found) > 16:
            raise Malformed("deb.archive", "the archive has too many members")
    names = [name for name, _ in found if not name.startswith("_")]
    if len(names) != 3 or names[0] != "debian-binary" or not found[0][1].startswith(b"2."):
        raise Malformed(
            "deb.members", "not the members of a package", expected="debian-binary, control.tar, data.tar", got=names
        )
    made = {}
    for wanted, (name, body) in zip(("control.tar", "data.tar"), [one for one in found if one[0] in names[1:]], strict=True):
        kind = name.removeprefix(wanted)
        if not name.startswith(wanted) or kind not in ("", ".gz", ".xz", ".zst"):
            raise Malformed("deb.members", "a member is not what it should be", expected=f"{wanted}[.gz|.xz|.zst]", got=name)
        made[wanted] = (kind, body)
    return made


def _decimal(field: bytes) -> int:
    text = field.rstrip(b" ")
    if not text.isdigit():
        raise Malformed("deb.archive", "a size is not a number", got=field)
    return int(text)


def _unpacked(kind: str, body: bytes, unzstd: Unpack | None) -> Iterator[bytes]:
    total = 0
    for piece in _raw(kind, body, unzstd):
        total += len(piece)
        if total > MAX_UNPACKED or (total > _RATIO_FROM and total > MAX_RATIO * len(body)):
            raise Malformed("deb.bomb", "the package unpacks to far more than it is", got=total)
        yield piece


def _raw(kind: str, body: bytes, unzstd: Unpack | None) -> Iterator[bytes]:
    if kind == "":
        yield from (body[at : at + _PIECE] for at in range(0, len(body), _PIECE))
        return
    if kind == ".zst":
        if unzstd is None:
            raise Malformed("deb.compression", "nothing here unpacks zst", got="data.tar.zst")
        yield from unzstd(body)
        return
    try:
        yield from _gz(body) if kind == ".gz" else _xz(body)
    except (zlib.error, lzma.LZMAError, EOFError) as error:
        raise Malformed("deb.compression", "a member cannot be unpacked", got=f"{kind}: {error}") from None


def _gz(body: bytes) -> Iterator[bytes]:
    unpack = zlib.decompressobj(31)
    rest = body
    while not unpack.eof:
        piece = unpack.decompress(rest, _PIECE)
        rest = unpack.unconsumed_tail
        if not piece and not rest and not unpack.eof:
            raise Malformed("deb.truncated", "a member ends inside its compression")
        yield piece
    if unpack.unused_data:
        raise Malformed("deb.trailing", "something stands behind the compressed data")


def _xz(body: bytes) -> Iterator[bytes]:
    unpack = lzma.LZMADecompressor(format=lzma.FORMAT_XZ, memlimit=_XZ_MEMORY)
    rest = body
    while not unpack.eof:
        piece = unpack.decompress(rest, _PIECE)
        rest = b""
        if not piece and unpack.needs_input and not unpack.eof:
            raise Malformed("deb.truncated", "a member ends inside its compression")
        yield piece
    if unpack.unused_data:
        raise Malformed("deb.trailing", "something stands behind the compressed data")


class _Bytes:
    """Pieces as a stream of exact reads."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self._pieces = pieces
        self._held = b""

    def some(self, most: int) -> bytes:
        """At least one byte and at most `most`; nothing at the end."""
        while not self._held:
            piece = next(self._pieces, None)
            if piece is None:
                return b""
            self._held = piece
        part, self._held = self._held[:most], self._held[most:]
        return part

    def exactly(self, size: int) -> bytes:
        parts = []
        while size:
            part = self.some(size)
            if not part:
                raise Malformed("deb.truncated", "the inner archive ends inside an entry")
            parts.append(part)
            size -= len(part)
        return b"".join(parts)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Entry:
    kind: bytes
    path: str
    target: str
    size: int
    mode: int


def _entries(stream: _Bytes) -> Iterator[_Entry]:
    """The headers of a tar archive (ustar, GNU long names, pax); the caller consumes `size` bytes and the padding."""
    long_path, long_target = "", ""
    while True:
        header = stream.some(_BLOCK)
        if header and len(header) < _BLOCK:
            header += stream.exactly(_BLOCK - len(header))
        if not header:
            raise Malformed("deb.truncated", "the inner archive has no end")
        if not any(header):
            _end(stream)
            return
        _checksum(header)
        kind, size = header[156:157], _octal(header[124:136])
        if kind in (b"L", b"K", b"x"):
            if size > _MAX_PATH * 4:
                raise Malformed("deb.path", "a name is too long", got=size)
            body = stream.exactly(size)
            stream.exactly(-size % _BLOCK)
            if kind == b"L":
                long_path = _text(body.rstrip(b"\x00"))
            elif kind == b"K":
                long_target = _text(body.rstrip(b"\x00"))
            else:
                named = _pax(body)
                long_path, long_target = named.get("path", long_path), named.get("linkpath", long_target)
            continue
        name, prefix = _text(header[:100].split(b"\x00")[0]), _text(header[345:500].split(b"\x00")[0])
        ustar = header[257:263] == b"ustar\x00" and bool(prefix)  # GNU's header has other fields where the prefix is
        yield _Entry(
            kind=kind,
            path=long_path or (f"{prefix}/{name}" if ustar else name),
            target=long_target or _text(header[157:257].split(b"\x00")[0]),
            size=size,
            mode=_octal(header[100:108]),
        )
        long_path, long_target = "", ""


def _end(stream: _Bytes) -> None:
    """Behind the last entry stand zeros and nothing else; reading to the end is also what proves the compression whole."""
    while piece := stream.some(_PIECE):
        if piece.strip(b"\x00"):
            raise Malformed("deb.trailing", "something stands behind the last entry")


def _files(pieces: Iterator[bytes], algorithm: str) -> dict[str, DebianFile]:
    stream, found, count = _Bytes(pieces), dict[str, DebianFile](), 0
    for entry in _entries(stream):
        count += 1
        if count > MAX_FILES:
            raise Malformed("deb.too_many_files", "the package has too many files", expected=f"<= {MAX_FILES}")
        path = _path(entry.path)
        if entry.kind in (b"0", b"\x00"):
            made = _hashed(stream, entry, algorithm)
        elif entry.kind == b"1":
            target = found.get(_path(entry.target))
            if target is None or entry.size:
                raise Malformed("deb.link", "a hard link to nothing that stands before it", got=entry.target)
            made = target
        elif entry.kind in (b"2", b"3", b"4", b"5", b"6"):
            if entry.size:
                raise Malformed("deb.entry", "an entry without contents has some", got=path)
            continue
        else:
            raise Malformed("deb.entry", "an entry of a kind that packages do not have", got=entry.kind)
        if path in found:
            raise Malformed("deb.path", "a file stands in the package twice", got=path)
        found[path] = made
    return found


def _hashed(stream: _Bytes, entry: _Entry, algorithm: str) -> DebianFile:
    digest, left = hashlib.new(algorithm), entry.size
    while left:
        part = stream.some(left)
        if not part:
            raise Malformed("deb.truncated", "the inner archive ends inside a file", got=entry.path)
        digest.update(part)
        left -= len(part)
    stream.exactly(-entry.size % _BLOCK)
    return DebianFile(digest=digest.digest(), size=entry.size, executable=bool(entry.mode & 0o111))


def _control(pieces: Iterator[bytes]) -> dict[str, str]:
    stream = _Bytes(pieces)
    for entry in _entries(stream):
        if entry.size > _MAX_CONTROL * 16:
            raise Malformed("deb.control", "a control file is too large", got=entry.size)
        if entry.kind in (b"0", b"\x00") and entry.path.removeprefix("./") == "control":
            if entry.size > _MAX_CONTROL:
                raise Malformed("deb.control", "the control file is too large", got=entry.size)
            return _fields(stream.exactly(entry.size))
        stream.exactly(entry.size + -entry.size % _BLOCK)
    raise Malformed("deb.control", "the package has no control file")


def _fields(body: bytes) -> dict[str, str]:
    found: dict[str, str] = {}
    for name, value in _FIELD.findall(_text(body)):
        if name in found or not _WORD.fullmatch(value):
            raise Malformed("deb.control", "a field of the control file is not usable", got=f"{name}: {value}")
        found[name] = value
    if len(found) != 3:
        raise Malformed(
            "deb.control", "the control file does not name the package", expected="Package, Version, Architecture"
        )
    return found


def _path(name: str) -> str:
    parts = name.removeprefix("./").strip("/").split("/") if name not in (".", "./") else []
    if name.startswith("/") or any(part in ("", ".", "..") for part in parts) or "\x00" in name or len(name) > _MAX_PATH:
        raise Malformed("deb.path", "a path that leads somewhere else", got=name[:200])
    return "/" + "/".join(parts)


def _text(body: bytes) -> str:
    try:
        return body.decode("utf-8")
    except UnicodeDecodeError:
        raise Malformed("deb.path", "a name is not UTF-8", got=body[:100]) from None


def _octal(field: bytes) -> int:
    text = field.rstrip(b"\x00 ").lstrip(b" ")
    if field[:1] == b"\x80":  # GNU: big-endian, for sizes over 8 GiB; a package has none
        raise Malformed("deb.entry", "a file is too large", got=field)
    if text and not re.fullmatch(rb"[0-7]+", text):
        raise Malformed("deb.entry", "a number of an entry is not octal", got=field)
    return int(text or b"0", 8)


def _checksum(header: bytes) -> None:
    said = _octal(header[148:156])
    if said != sum(header[:148]) + 8 * 0x20 + sum(header[156:]):
        raise Malformed("deb.entry", "the checksum of an entry does not hold")


def _pax(body: bytes) -> dict[str, str]:
    """The records `length key=value`; a record that would change the size or make holes is refused."""
    found: dict[str, str] = {}
    while body:
        length, space, _ = body.partition(b" ")
        if not space or not length.isdigit() or len(length) > 6 or not len(length) + 3 <= int(length) <= len(body):
            raise Malformed("deb.entry", "an extended header cannot be read")
        key, _, value = _text(body[len(length) + 1 : int(length)]).removesuffix("\n").partition("=")
        if key == "size" or key.startswith("GNU.sparse"):
            raise Malformed("deb.entry", "an extended header changes what the file is", got=key)
        found[key] = value
        body = body[int(length) :]
    return found
