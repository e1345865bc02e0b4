"""Whether an IMA list replays to the quoted PCR 10 from where the verifier stopped last time (PROTOCOLS.md 8).

1. The running value starts from what this verifier holds for the host, or from zero after a boot; never from the host's
   word.
2. Every entry is of PCR 10, and its template hash is that of its own fields; a violation extends 0xff bytes.
3. The list may be ahead of the quote: entries are taken until the running value is the quoted one, and no further.
4. If it never is, nothing is taken and the evidence is refused: a gap, a changed, missing or reordered entry.

What comes out says that these entries were measured, in this order. Whether they may run is policy. Kernels before 5.8,
which pad SHA-1 template hashes in a SHA-256 bank, do not replay here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

from moorline.digest import same
from moorline.errors import Malformed, NotAuthentic
from moorline.evidence.ima import PCR, ImaEntry, parse_line, split_lines
from moorline.evidence.tpm_structures import HASH_NAMES, HASH_SIZES

_KNOWN_LINES: Final = 16384
_TEMPLATE_HASHES: Final = {20: "sha1", 32: "sha256"}


@dataclass(frozen=True, slots=True, kw_only=True)
class ImaState:
    """How far this verifier has replayed one host's list: number of entries, and the PCR value they add up to."""

    count: int
    running: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class ImaProgress:
    """New entries, proven by the quoted PCR 10, and the state after them. `surplus` entries were not yet quoted."""

    state: ImaState
    entries: tuple[ImaEntry, ...]
    surplus: int


def initial(bank: int) -> ImaState:
    """The state at boot: no entry, PCR 10 all zero."""
    return ImaState(count=0, running=bytes(HASH_SIZES[bank]))


def verify_ima(before: ImaState, data: bytes, *, bank: int, quoted: bytes) -> ImaProgress:
    """The entries of `data` (lines after `before.count`) that the quoted value of PCR 10 proves.

    Raises Malformed (`ima.*`) and NotAuthentic("ima.pcr" | "ima.template_hash" | "ima.replay_mismatch").
    """
    name = HASH_NAMES[bank]
    lines = split_lines(data)
    running = before.running
    entries: list[ImaEntry] = []
    hashed = hashlib.sha256 if name == "sha256" else getattr(hashlib, name)
    for line in lines:
        if running == quoted:
            break
        entry, extension = _measured(line, name)
        running = hashed(running + extension).digest()
        entries.append(entry)
    if not same(running, quoted):
        raise NotAuthentic(
            "ima.replay_mismatch",
            "the IMA list does not replay to the quoted PCR 10",
            expected=quoted,
            got=f"{running.hex()} after {before.count}+{len(entries)} entries",
            remedy="send the list from its beginning; if that fails too, the list was tampered with",
        )
    state = ImaState(count=before.count + len(entries), running=running)
    return ImaProgress(state=state, entries=tuple(entries), surplus=len(lines) - len(entries))


def boot_aggregate(pcrs: Mapping[int, bytes]) -> bytes:
    """The digest the first entry must hold: SHA-256 over PCR 0 to 9 (kernel: ima_calc_boot_aggregate)."""
    return hashlib.sha256(b"".join(pcrs[index] for index in range(10))).digest()


@lru_cache(maxsize=_KNOWN_LINES)  # bounded: hosts of one kind run the same files, so lines repeat across hosts
def _measured(line: bytes, bank_name: str) -> tuple[ImaEntry, bytes]:
    """The entry of a line, and what it extends into a bank; both depend on the line alone."""
    entry = parse_line(line)
    if entry.pcr != PCR:
        raise NotAuthentic("ima.pcr", "an entry of the IMA list is for another PCR", expected=PCR, got=entry.pcr)
    if entry.violation:
        return entry, b"\xff" * hashlib.new(bank_name).digest_size
    data = entry.template_data()
    listed = _TEMPLATE_HASHES.get(len(entry.template_hash))
    if listed is None:
        raise Malformed("ima.line", "a template hash has the wrong length", got=len(entry.template_hash))
    if hashlib.new(listed, data).digest() != entry.template_hash:
        raise NotAuthentic(
            "ima.template_hash", "an entry of the IMA list is not what its own hash covers", expected=entry.template_hash
        )
    return entry, hashlib.new(bank_name, data).digest()
