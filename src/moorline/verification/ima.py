"""Whether an IMA list replays to the quoted PCR 10 from where the verifier stopped last time (PROTOCOLS.md 8).

1. The running value starts from what this verifier holds for the host, or from zero after a boot; never from the host's
   word.
2. Every entry is of PCR 10, and its template hash is that of its own fields; a violation extends 0xff bytes.
3. The list may be ahead of the quote: entries are taken until the running value is the quoted one, and no further.
4. If it never is, nothing is taken and the evidence is refused: a gap, a changed, missing or reordered entry.
5. A list in pieces: all entries of a piece that says the list goes on are taken, and prove nothing yet. The running value is
   kept by this verifier and goes into 1 for the next piece; the piece whose running value is the quoted one proves them all.

What comes out says that these entries were measured, in this order. Whether they may run is policy. Kernels before 5.8,
which pad SHA-1 template hashes in a SHA-256 bank, do not replay here.

`AllowedLines` is a shortcut through 2 and no rule of its own: what each allowed file looks like as a line, and what that
line extends, worked out once from the reference values and shared by all hosts. A line of a list that is one of them, byte
for byte, is that allowed file; any other line takes the long way. Both are proven by 3 and 4 alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from moorline.digest import same
from moorline.errors import Malformed, NotAuthentic, Unavailable
from moorline.evidence.ima import DIGEST_SIZES, MAX_PATH, PCR, ImaEntry, parse_line, serialize_line, split_lines
from moorline.evidence.tpm_structures import HASH_NAMES, HASH_SIZES

_KNOWN_LINES: Final = 16384
_HASHERS: Final = {  # hashlib.new looks the name up in OpenSSL each time
    "sha1": hashlib.sha1,
    "sha256": hashlib.sha256,
    "sha384": hashlib.sha384,
    "sha512": hashlib.sha512,
}
_TEMPLATE_HASHES: Final = {made().digest_size: (name, made) for name, made in _HASHERS.items()}
_ALGORITHMS: Final = {size: name for name, size in DIGEST_SIZES.items() if name != "sm3_256"}
_NOT_LISTED: Final = frozenset(b"\n\x00")


@dataclass(frozen=True, slots=True, kw_only=True)
class ImaState:
    """How far this verifier has replayed one host's list: number of entries, and the PCR value they add up to."""

    count: int
    running: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class ImaProgress:
    """New entries, proven by the quoted PCR 10, and the state after them. `surplus` entries were not yet quoted.

    Not `whole`, they are a piece that the quote does not reach: proven by nothing before the last piece is.
    `allowed` entries were lines of the `AllowedLines` given, and are not in `entries`.
    """

    state: ImaState
    entries: tuple[ImaEntry, ...]
    surplus: int
    allowed: int
    whole: bool = True


@dataclass(frozen=True, slots=True)
class AllowedLines:
    """Lines of allowed files in one bank, and what each extends. Made once by `load`, read by every appraisal."""

    bank: int
    extensions: Mapping[bytes, bytes]

    @classmethod
    def load(
        cls, files: Mapping[bytes, Iterable[bytes]], *, bank: int, templates: Iterable[str], template_hash: str = "sha1"
    ) -> AllowedLines:
        """The lines of `files` (path, digests) in `templates`, without a signature, as a kernel would write them.

        A file that cannot stand in a line, or whose digest has no known length, has no line here and takes the long way.
        Raises Unavailable("ima.hash_unsupported").
        """
        name = _bank_name(bank)
        extensions: dict[bytes, bytes] = {}
        for template in templates:
            for path, digests in files.items():
                if not path or len(path) > MAX_PATH or not _NOT_LISTED.isdisjoint(path):
                    continue
                for digest in digests:
                    if len(digest) in _ALGORITHMS:
                        line, extension = _allowed(path, digest, template, template_hash, name)
                        extensions[line] = extension
        return cls(bank, extensions)


def initial(bank: int) -> ImaState:
    """The state at boot: no entry, PCR 10 all zero."""
    return ImaState(count=0, running=bytes(HASH_SIZES[bank]))


def verify_ima(
    before: ImaState, data: bytes, *, bank: int, quoted: bytes, allowed: AllowedLines | None = None, more: bool = False
) -> ImaProgress:
    """The entries of `data` (lines after `before.count`) that the quoted value of PCR 10 proves.

    With `allowed`, lines of allowed files are counted and not returned. With `more`, the list goes on behind `data`, which
    may be a piece (number 5 of the module). Raises Malformed (`ima.*`),
    NotAuthentic("ima.pcr" | "ima.template_hash" | "ima.replay_mismatch") and Unavailable("ima.hash_unsupported").
    """
    name = _bank_name(bank)
    lines = split_lines(data)
    running = before.running
    entries: list[ImaEntry] = []
    hashed, seen = _HASHERS[name], _SEEN[name]
    known = allowed.extensions.get if allowed is not None and allowed.bank == bank else None
    taken = 0
    for line in lines:
        if running == quoted:
            break
        extension = None if known is None else known(line)
        if extension is None:
            found = seen.get(line)
            if found is None:
                entry = parse_line(line)
                extension = _extension(entry, name)
                if len(seen) >= _KNOWN_LINES:
                    seen.clear()
                seen[line] = entry, extension
            else:
                entry, extension = found
            entries.append(entry)
        running = hashed(running + extension).digest()
        taken += 1
    whole = not (more and taken) or same(running, quoted)
    if whole:
        _require_quoted(running, quoted, before=before.count, taken=taken)
    state = ImaState(count=before.count + taken, running=running)
    surplus, known_ones = len(lines) - taken, taken - len(entries)
    return ImaProgress(state=state, entries=tuple(entries), surplus=surplus, allowed=known_ones, whole=whole)


def verify_entries(before: ImaState, entries: Iterable[ImaEntry], *, bank: int, quoted: bytes) -> ImaProgress:
    """As `verify_ima`, for entries that were parsed already, such as those of a binary list."""
    name = _bank_name(bank)
    given, hashed = tuple(entries), _HASHERS[name]
    running, taken = before.running, 0
    for entry in given:
        if running == quoted:
            break
        running = hashed(running + _extension(entry, name)).digest()
        taken += 1
    _require_quoted(running, quoted, before=before.count, taken=taken)
    state = ImaState(count=before.count + taken, running=running)
    return ImaProgress(state=state, entries=given[:taken], surplus=len(given) - taken, allowed=0)


def replay(entries: Iterable[ImaEntry], bank: int) -> bytes:
    """PCR 10 after all of `entries` from boot; compared with nothing.

    Raises NotAuthentic("ima.pcr" | "ima.template_hash") and Unavailable("ima.hash_unsupported").
    """
    name = _bank_name(bank)
    running = bytes(HASH_SIZES[bank])
    for entry in entries:
        running = _HASHERS[name](running + _extension(entry, name)).digest()
    return running


def boot_aggregate(pcrs: Mapping[int, bytes]) -> bytes:
    """The digest the first entry must hold: SHA-256 over PCR 0 to 9 (kernel: ima_calc_boot_aggregate)."""
    return hashlib.sha256(b"".join(pcrs[index] for index in range(10))).digest()


def _bank_name(bank: int) -> str:
    name = HASH_NAMES.get(bank)
    if name is None:
        raise Unavailable(
            "ima.hash_unsupported",
            "IMA lists are not replayed in this bank",
            expected=", ".join(HASH_NAMES.values()),
            got=hex(bank),
            remedy="quote another bank",
        )
    return name


def _require_quoted(running: bytes, quoted: bytes, *, before: int, taken: int) -> None:
    if not same(running, quoted):
        raise NotAuthentic(
            "ima.replay_mismatch",
            "the IMA list does not replay to the quoted PCR 10",
            expected=quoted,
            got=f"{running.hex()} after {before}+{taken} entries",
            remedy="send the list from its beginning; if that fails too, the list was tampered with",
        )


def _allowed(path: bytes, digest: bytes, template: str, template_hash: str, bank_name: str) -> tuple[bytes, bytes]:
    shape = ImaEntry(PCR, b"", template, _ALGORITHMS[len(digest)], digest, path, b"", _type_of(template))
    data = shape.template_data()
    measured = hashlib.new(template_hash, data).digest()
    entry = ImaEntry(PCR, measured, template, shape.algorithm, digest, path, b"", shape.digest_type)
    return serialize_line(entry), hashlib.new(bank_name, data).digest()


def _type_of(template: str) -> str:
    return "ima" if template in ("ima-ngv2", "ima-sigv2") else ""


_SEEN: Final[dict[str, dict[bytes, tuple[ImaEntry, bytes]]]] = {name: {} for name in _HASHERS}
"""By bank: lines seen, their entries, and what they extend; all of it depends on the line alone.

Hosts of one kind run the same files, so lines repeat across hosts. Bounded: a full table is emptied, which costs time only.
"""


def forget_lines() -> None:
    """Forget the lines seen: what a line costs that nobody knows is what benchmarks ask."""
    for seen in _SEEN.values():
        seen.clear()


def _extension(entry: ImaEntry, bank_name: str) -> bytes:
    if entry.pcr != PCR:
        raise NotAuthentic("ima.pcr", "an entry of the IMA list is for another PCR", expected=PCR, got=entry.pcr)
    data, template_hash = entry.template_data(), entry.template_hash
    listed = _TEMPLATE_HASHES.get(len(template_hash))
    if listed is None:
        raise Malformed("ima.line", "a template hash has the wrong length", got=len(template_hash))
    listed_name, hashed = listed
    if hashed(data).digest() != template_hash:
        if entry.violation:  # a template hash of zeros, which nothing hashes to
            return b"\xff" * _HASHERS[bank_name]().digest_size
        raise NotAuthentic(
            "ima.template_hash", "an entry of the IMA list is not what its own hash covers", expected=template_hash
        )
    return template_hash if listed_name == bank_name else _HASHERS[bank_name](data).digest()
