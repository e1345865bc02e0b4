"""Packages and files of a Debian machine, for reference values: what touches programs and disks, and nothing else.

`gpgv` verifies a release under a keyring that the caller names, `zstd` unpacks what the standard library cannot, and
`dpkg-query` and `apt-get download` bring the packages that are installed. Each is a program of the system, asked with
fixed arguments.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Final

from moorline.errors import Malformed, Misconfigured, NotAuthentic, Unavailable

MAX_HOST_FILES: Final = 1_000_000
_PIECE: Final = 1 << 18


def unzstd(body: bytes) -> Iterator[bytes]:
    """The contents of a zst stream, by the program `zstd`.

    Raises Misconfigured("refs.no_zstd") and Malformed("deb.compression").
    """
    program = _program("zstd")
    if program is None:
        raise Misconfigured("refs.no_zstd", "the program zstd is not installed", remedy="apt-get install zstd")
    with tempfile.TemporaryFile() as source:
        source.write(body)
        source.seek(0)
        child = subprocess.Popen(
            [program, "-dcq", "--memory=256MB", "--single-thread"],
            stdin=source,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        assert child.stdout is not None
        try:
            while piece := child.stdout.read(_PIECE):
                yield piece
            if child.wait() != 0:
                raise Malformed("deb.compression", "a member cannot be unpacked", got="zst")
        finally:
            child.kill()
            child.stdout.close()
            child.wait()


def verified_release(inrelease: bytes, keyring: Path) -> bytes:
    """The text that was signed, of an InRelease file whose signature holds under a key in `keyring`.

    Only what gpgv writes out is returned: text beside the signed part is not. Raises Misconfigured("refs.no_gpgv" |
    "refs.keyring") and NotAuthentic("refs.release_signature").
    """
    program = _program("gpgv")
    if program is None:
        raise Misconfigured("refs.no_gpgv", "the program gpgv is not installed", remedy="apt-get install gpgv")
    if not keyring.is_file():
        raise Misconfigured("refs.keyring", "there is no such keyring", got=keyring, remedy="name the archive's keyring")
    with tempfile.TemporaryDirectory(prefix="moor-refs-") as folder:
        signed, out = Path(folder, "InRelease"), Path(folder, "Release")
        signed.write_bytes(inrelease)
        done = subprocess.run(
            [program, "--keyring", str(keyring.resolve()), "--status-fd", "1", "--output", str(out), str(signed)],
            capture_output=True,
            text=True,
            check=False,
            env={"PATH": "/usr/bin:/bin", "GNUPGHOME": folder, "LC_ALL": "C"},
        )
        good = any(line.startswith("[GNUPG:] VALIDSIG ") for line in done.stdout.splitlines())
        if done.returncode != 0 or not good or not out.is_file():
            raise NotAuthentic(
                "refs.release_signature",
                "the release is not signed by a key of the keyring",
                expected=keyring,
                remedy="fetch InRelease again, and name the keyring of that archive",
            )
        return out.read_bytes()


def installed() -> tuple[tuple[str, str, str], ...]:
    """Name, version and architecture of every installed package. Raises Unavailable("refs.dpkg")."""
    program = _program("dpkg-query")
    if program is None:
        raise Misconfigured("refs.no_dpkg", "this is not a Debian machine", remedy="give .deb files")
    done = subprocess.run(
        [program, "-W", "-f", "${db:Status-Abbrev}\t${Package}\t${Version}\t${Architecture}\n"],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise Unavailable("refs.dpkg", "dpkg does not say what is installed", got=done.stderr.strip()[:200])
    rows = [line.split("\t") for line in done.stdout.splitlines()]
    return tuple((row[1], row[2], row[3]) for row in rows if len(row) == 4 and row[0].startswith("ii"))


def downloaded(name: str, version: str, architecture: str) -> bytes:
    """The .deb of exactly this version, verified by apt against its signed indexes. Raises Unavailable("refs.download")."""
    program = _program("apt-get")
    if program is None:
        raise Misconfigured("refs.no_apt", "the program apt-get is not installed", remedy="give .deb files")
    with tempfile.TemporaryDirectory(prefix="moor-refs-") as folder:
        done = subprocess.run(
            [program, "-qq", "download", f"{name}:{architecture}={version}"],
            cwd=folder,
            capture_output=True,
            text=True,
            check=False,
        )
        made = list(Path(folder).glob("*.deb"))
        if done.returncode != 0 or len(made) != 1:
            raise Unavailable(
                "refs.download",
                "apt does not bring the package",
                got=f"{name}:{architecture}={version}",
                remedy="apt-get update; or give the .deb itself, if it came from elsewhere",
            )
        return made[0].read_bytes()


def host_files(root: Path, below: tuple[str, ...], algorithm: str) -> Iterator[tuple[str, bytes]]:
    """Path and digest of every regular file below some directories of a golden host's tree; links are not followed.

    What cannot be opened raises Unavailable("refs.host_file"): a golden host is read whole, or not at all.
    """
    count = 0
    for start in below:
        for folder, folders, names in os.walk(root / start.lstrip("/"), followlinks=False, onerror=_unreadable):
            folders.sort()
            for name in sorted(names):
                path = Path(folder, name)
                made = _hashed(path, algorithm)
                if made is None:
                    continue
                count += 1
                if count > MAX_HOST_FILES:
                    raise Misconfigured(
                        "refs.too_many_files", "the host has too many files", expected=f"<= {MAX_HOST_FILES}"
                    )
                yield "/" + os.fsencode(path.relative_to(root)).decode("utf-8", "backslashreplace"), made


def _unreadable(error: OSError) -> None:
    raise Unavailable(
        "refs.host_file",
        "a folder of the host cannot be read",
        got=f"{error.filename}: {error.strerror}",
        remedy="run as root",
    ) from None


def _hashed(path: Path, algorithm: str) -> bytes | None:
    try:
        if not stat.S_ISREG(path.lstat().st_mode):
            return None
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(handle, "rb") as file:
            return _digest_of(file, algorithm)
    except OSError as error:
        raise Unavailable(
            "refs.host_file", "a file of the host cannot be read", got=f"{path}: {error.strerror}", remedy="run as root"
        ) from None


def _digest_of(file: IO[bytes], algorithm: str) -> bytes:
    digest = hashlib.new(algorithm)
    while piece := file.read(_PIECE):
        digest.update(piece)
    return digest.digest()


def _program(name: str) -> str | None:
    return shutil.which(name, path="/usr/bin:/bin:/usr/local/bin")
