"""A zip from a stranger, read without being hurt: names and bytes of regular files, or Malformed.

Refused before anything is inflated: too many entries, names that leave the archive or differ only in case, links and
devices, encrypted entries, odd compression, announced sizes or ratios beyond the caps, and bytes in front of or behind the
archive (a file that is two formats at once). Nothing is ever written to disk from here.
"""

from __future__ import annotations

import io
import re
import stat
import zipfile
from typing import Final

from moorline.errors import Malformed
from moorline.wire.orchestration import MAX_PACKAGE_BYTES

MAX_ENTRIES: Final = 256
MAX_FILE_BYTES: Final = 8 << 20
MAX_TOTAL_BYTES: Final = 32 << 20
MAX_RATIO: Final = 100
_RATIO_MATTERS_FROM: Final = 64 * 1024

_NAME: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,99}(?:/[A-Za-z0-9_][A-Za-z0-9._-]{0,99}){0,7}")
_ENCRYPTED: Final = 0x1
_LOCAL_HEADER: Final = b"PK\x03\x04"
_END_RECORD_BYTES: Final = 22
_END_RECORD: Final = b"PK\x05\x06"


def read(data: bytes) -> dict[str, bytes]:
    """The regular files of the archive by name. Input is untrusted; raises only Malformed (`package.*`)."""
    if len(data) > MAX_PACKAGE_BYTES:
        raise Malformed("package.too_large", "the package is too large", expected=MAX_PACKAGE_BYTES, got=len(data))
    if not data.startswith(_LOCAL_HEADER) or data[-_END_RECORD_BYTES:][:4] != _END_RECORD:
        raise Malformed("package.malformed", "not a plain zip archive: other bytes stand before or behind it")
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            entries = _acceptable(archive.infolist())
            return {entry.filename: archive.read(entry) for entry in entries}
    except Malformed:
        raise
    except Exception as error:  # zipfile raises BadZipFile, zlib.error, EOFError, struct.error, NotImplementedError ...
        raise Malformed("package.malformed", "the zip archive cannot be read", got=type(error).__name__) from None


def write(files: dict[str, bytes]) -> bytes:
    """The same bytes for the same files: sorted, fixed times and modes. Entries must satisfy what `read` accepts."""
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for name in sorted(files, key=_meta_first):
            entry = zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))
            entry.compress_type = zipfile.ZIP_DEFLATED
            entry.create_system = 3  # Unix, whatever machine builds it
            entry.external_attr = (stat.S_IFREG | 0o644) << 16
            archive.writestr(entry, files[name])
    return target.getvalue()


def _meta_first(name: str) -> tuple[bool, str]:
    return (name != "TOSCA-Metadata/TOSCA.meta", name)


def _acceptable(entries: list[zipfile.ZipInfo]) -> list[zipfile.ZipInfo]:
    if len(entries) > MAX_ENTRIES:
        raise Malformed("package.too_large", "the archive has too many entries", expected=MAX_ENTRIES, got=len(entries))
    total = sum(entry.file_size for entry in entries)
    if total > MAX_TOTAL_BYTES:
        raise Malformed("package.too_large", "the archive would inflate too far", expected=MAX_TOTAL_BYTES, got=total)
    seen: set[str] = set()
    for entry in entries:
        _judge_name(entry)
        _judge_kind(entry)
        _judge_size(entry)
        folded = entry.filename.casefold()
        if folded in seen:
            raise Malformed("package.duplicate", "two entries have one name", got=entry.filename)
        seen.add(folded)
    return [entry for entry in entries if not entry.is_dir()]


def _judge_name(entry: zipfile.ZipInfo) -> None:
    name = entry.filename[:-1] if entry.is_dir() else entry.filename
    # `orig_filename` differs when zipfile cut the name at a NUL or turned separators round.
    if entry.orig_filename != entry.filename or _NAME.fullmatch(name) is None:
        raise Malformed(
            "package.name",
            "an entry has a name that is not allowed",
            expected="relative, of A-Z a-z 0-9 . _ -, no segment beginning with a dot or hyphen",
            got=repr(entry.orig_filename),
        )


def _judge_kind(entry: zipfile.ZipInfo) -> None:
    kind = stat.S_IFMT(entry.external_attr >> 16)
    if kind not in ((0, stat.S_IFDIR) if entry.is_dir() else (0, stat.S_IFREG)):
        raise Malformed("package.symlink", "an entry is a link or device", expected="regular files", got=entry.filename)
    if entry.flag_bits & _ENCRYPTED or entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise Malformed("package.compression", "an entry is encrypted or oddly compressed", got=entry.filename)


def _judge_size(entry: zipfile.ZipInfo) -> None:
    if entry.file_size > (0 if entry.is_dir() else MAX_FILE_BYTES):
        raise Malformed("package.too_large", "an entry is too large", expected=MAX_FILE_BYTES, got=entry.file_size)
    if entry.file_size > _RATIO_MATTERS_FROM and entry.file_size > MAX_RATIO * entry.compress_size:
        raise Malformed("package.compression", "an entry inflates suspiciously far", expected=MAX_RATIO, got=entry.filename)
