"""Release and Packages of a Debian archive: which digest a package has, as its signed index says.

InRelease is signed (the caller verifies it before: `attesters.debian.verified_release`), it names the digest of each
Packages file, and that names the digest of each package. Each function takes one link downwards; none trusts a name.
"""

from __future__ import annotations

import hashlib
import re
from typing import Final

from moorline.digest import same
from moorline.errors import Malformed, NotAuthentic

MAX_INDEX: Final = 512 << 20
_ENTRY: Final = re.compile(r"^ ([0-9a-f]{64}) +([0-9]{1,12}) (\S{1,512})$")
_SHA256: Final = re.compile(r"^[0-9a-f]{64}$")


def digests_of_release(release: bytes) -> dict[str, bytes]:
    """Path below the archive to SHA-256, of a Release file that was VERIFIED. Raises only Malformed("deb_index.release")."""
    found: dict[str, bytes] = {}
    listing = False
    for line in _lines(release):
        if not line.startswith(" "):
            listing = line == "SHA256:"
            continue
        match = _ENTRY.match(line)
        if listing and match is None:
            raise Malformed("deb_index.release", "a line of the release's digests cannot be read", got=line[:100])
        if listing and match is not None:
            if match[3] in found:
                raise Malformed("deb_index.release", "the release names a file twice", got=match[3])
            found[match[3]] = bytes.fromhex(match[1])
    if not found:
        raise Malformed("deb_index.release", "the release names no SHA-256 digests")
    return found


def verify_packages(packages: bytes, listed: dict[str, bytes]) -> None:
    """Whether a verified release names exactly these bytes, as some Packages file.

    Raises NotAuthentic("deb_index.packages_not_in_release").
    """
    digest = hashlib.sha256(packages).digest()
    for path, wanted in listed.items():
        if path.rpartition("/")[2] == "Packages" and same(wanted, digest):
            return
    raise NotAuthentic(
        "deb_index.packages_not_in_release",
        "the index of packages is not the one the release names",
        got=digest,
        remedy="fetch both again, unpacked, from the same moment",
    )


def digests_of_packages(packages: bytes) -> dict[str, bytes]:
    """`name_version_architecture` to SHA-256 of the .deb. Raises only Malformed("deb_index.packages")."""
    found: dict[str, bytes] = {}
    for stanza in _stanzas(packages):
        digest = stanza.get("SHA256", "")
        if not _SHA256.match(digest) or not all(stanza.get(one) for one in ("Package", "Version", "Architecture")):
            raise Malformed("deb_index.packages", "an entry of the index lacks name or digest", got=stanza.get("Package"))
        name = f"{stanza['Package']}_{stanza['Version']}_{stanza['Architecture']}"
        if found.setdefault(name, bytes.fromhex(digest)) != bytes.fromhex(digest):
            raise Malformed("deb_index.packages", "the index names a package twice, with different digests", got=name)
    return found


def verify_package(identity: str, sha256: bytes, listed: dict[str, bytes]) -> None:
    """Whether a verified index names this very package. Raises NotAuthentic with one of two codes."""
    wanted = listed.get(identity)
    if wanted is None:
        raise NotAuthentic("deb_index.not_listed", "the index does not name the package", got=identity)
    if not same(wanted, sha256):
        raise NotAuthentic(
            "deb_index.digest",
            "the package is not the one the index names",
            expected=wanted,
            got=sha256,
            remedy="fetch it again; if it differs again, do not install it",
        )


def _stanzas(packages: bytes) -> list[dict[str, str]]:
    made: list[dict[str, str]] = []
    held: dict[str, str] = {}
    for line in [*_lines(packages), ""]:
        if not line.strip():
            if held:
                made.append(held)
            held = {}
        elif not line[0].isspace():
            name, _, value = line.partition(":")
            if name in held:
                raise Malformed("deb_index.packages", "a field stands twice in an entry", got=name)
            held[name] = value.strip()
    return made


def _lines(data: bytes) -> list[str]:
    if len(data) > MAX_INDEX:
        raise Malformed("deb_index.too_large", "the index is too large", got=len(data))
    return data.decode("utf-8", "replace").split("\n")
