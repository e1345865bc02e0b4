"""What a simulated guest runs, as bytes: the image, its manifest, its launch digest. The same answer offline and in silicon.

The image is a whole root file system and the only one a guest sees: the interpreter, the standard library, every shared
library that any of it loads, the `moorline` package, the distributions a guest needs, and one start script. Nothing of the
host's /usr shows through, so nothing runs that was not measured.

The measured bytes are the *hashes page*: a manifest in deterministic CBOR (`Manifest`) that lists every file with the
SHA-384 of its content, and the command line and environment it is started with, padded to pages of 4096 bytes. The launch
digest is the SNP page chain over those pages (`verification.snp_launch`), as OVMF's hashes page stands for a kernel
that is loaded after the measurement. No vCPU state (VMSA) is measured: this guest is a process.

`measure(entry)` is for whoever publishes a package: it reads this installation and writes nothing.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Final

import moorline
from moorline.errors import Misconfigured, Refused
from moorline.simulators.silicon import IMAGE_GPA
from moorline.verification.snp_launch import in_pages, launch_digest
from moorline.wire import schema
from moorline.wire.guest import SHARED_DIRECTORY
from moorline.wire.schema import Bytes48

DISTRIBUTIONS: Final = ("cryptography", "cbor2", "pyOpenSSL")
"""What a guest may import beside the standard library and moorline; their own requirements follow."""

SITE: Final = "moor/site"
START: Final = "moor/start.py"
BYTECODE: Final = "moor/bytecode"
MOUNT_POINTS: Final = ("proc", "dev", "tmp", "run/moor", BYTECODE)
_FIXED_TIME: Final = 1_600_000_000
_ENTRY: Final = re.compile(r"moorline(\.[a-z_][a-z0-9_]*)+")
_REQUIREMENT: Final = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]*)\s*([^;]*)(;.*)?")
_LIBRARY: Final = re.compile(r"(?:=>\s*)?(/\S+) \(0x[0-9a-f]+\)")
_LEFT_OUT: Final = frozenset(
    (
        "__pycache__",
        "_ctypes_test",
        "_curses",
        "_curses_panel",
        "_dbm",
        "_sqlite3",
        "_testbuffer",
        "_testcapi",
        "_testclinic",
        "_testimportmultiple",
        "_testinternalcapi",
        "_testmultiphase",
        "_tkinter",
        "_xxtestfuzz",
        "nis",
        "readline",
        "config",
        "curses",
        "dbm",
        "dist-packages",
        "distutils",
        "ensurepip",
        "idlelib",
        "lib2to3",
        "msilib",
        "pydoc_data",
        "site-packages",
        "sqlite3",
        "test",
        "tests",
        "tkinter",
        "turtledemo",
        "unittest",
        "venv",
        "wsgiref",
        "xmlrpc",
    )
)
ROOMS_LEFT_OUT: Final = frozenset(("cli", "console", "simulators", "storage"))
"""Rooms of moorline that no guest runs: commands, web pages, this very simulation, and SQL."""

_START_SCRIPT: Final = b'''"""First code of a guest: put the measured packages on the path, then run the measured entry.

A guest does not outlive its processor: when the silicon's end of the report descriptor closes, it ends, at any moment. The
sandbox's own die-with-parent misses a silicon that dies in the first milliseconds of a guest.
"""
import os
import runpy
import select
import sys
import threading


def end_with_silicon(descriptor):
    hung_up = select.POLLHUP | select.POLLRDHUP | select.POLLERR | select.POLLNVAL
    poll = select.poll()
    poll.register(descriptor, select.POLLRDHUP)
    while not any(events & hung_up for _, events in poll.poll()):
        pass
    os._exit(70)


own = os.dup(int(os.environ["MOOR_SILICON_FD"]))
threading.Thread(target=end_with_silicon, args=(own,), daemon=True).start()
sys.path.append("/moor/site")
sys.argv = sys.argv[1:]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
'''


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageFile:
    """One file of the image: path below its root, whether it is executable, SHA-384 of its content."""

    path: str
    executable: bool
    sha384: Bytes48


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """The hashes page. `files` are sorted by path; `environment` is without the number of the report descriptor."""

    version: int
    arguments: tuple[str, ...]
    environment: dict[str, str]
    files: tuple[ImageFile, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Where a file of the image comes from: a path of this installation, or `content`."""

    path: str
    origin: Path | None
    content: bytes
    executable: bool

    def read(self) -> bytes:
        """Its bytes, read now."""
        return self.content if self.origin is None else self.origin.read_bytes()


def measure(entry: str) -> bytes:
    """The launch digest of `entry` under the guest runtime of this installation, 48 bytes; no silicon is needed.

    Raises Refused("silicon.entry_unknown") if the image has no such module.
    """
    files = tuple(sorted((_measured(source, source.read()) for source in sources()), key=lambda file: file.path))
    return measurement(entry, files)


def measurement(entry: str, files: tuple[ImageFile, ...]) -> bytes:
    """The launch digest of `entry` over an image of `files`."""
    require_entry(entry, files)
    manifest = Manifest(version=1, arguments=arguments(entry), environment=environment(), files=files)
    return launch_digest(in_pages(schema.encode(manifest)), first_gpa=IMAGE_GPA)


def require_entry(entry: str, files: tuple[ImageFile, ...]) -> None:
    """Raises Refused("silicon.entry_unknown") unless `entry` is a module of moorline in the image."""
    stem = f"{SITE}/{entry.replace('.', '/')}"
    if _ENTRY.fullmatch(entry) is None or not {f"{stem}.py", f"{stem}/__main__.py"} & {file.path for file in files}:
        raise Refused("silicon.entry_unknown", "the guest image has no such module to run", got=entry)


def arguments(entry: str) -> tuple[str, ...]:
    """The command line of a guest: isolated, no site module, no bytecode written, the entry."""
    return (interpreter(), "-I", "-S", "-B", "-X", f"pycache_prefix=/{BYTECODE}", f"/{START}", entry)


def environment() -> dict[str, str]:
    """All environment variables of a guest but the number of its report descriptor."""
    return {"HOME": "/tmp", "LANG": "C.UTF-8", "PATH": "/nonexistent", "PYTHONHASHSEED": "random"}  # noqa: S108 - in the guest


def interpreter() -> str:
    """The path of the interpreter, the same inside and outside, without links."""
    return os.path.realpath(sys.executable)


def working_directory() -> str:
    """Where a guest starts: the directory it shares with its host."""
    return SHARED_DIRECTORY


def install(root: Path) -> tuple[ImageFile, ...]:
    """A private copy of the image below `root`, and what was copied, measured from the very bytes that were written."""
    measured = []
    for source in sources():
        data = source.read()
        target = root / source.path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)
        target.chmod(0o555 if source.executable else 0o444)
        os.utime(target, (_FIXED_TIME, _FIXED_TIME))
        measured.append(_measured(source, data))
    for name in MOUNT_POINTS:
        (root / name).mkdir(parents=True, exist_ok=True)
    return tuple(sorted(measured, key=lambda file: file.path))


def sources() -> list[Source]:
    """Every file of the image of this installation."""
    found: dict[str, Source] = {}
    for path, origin, executable in [*_runtime(), *_packages()]:
        found[path] = Source(path=path, origin=origin, content=b"", executable=executable)
    found[START] = Source(path=START, origin=None, content=_START_SCRIPT, executable=False)
    binaries = [source.origin for source in found.values() if source.origin is not None and _is_elf(source.origin)]
    for library in libraries(tuple(sorted(binaries))):
        path = str(library).lstrip("/")
        found.setdefault(path, Source(path=path, origin=library, content=b"", executable=library.name.startswith("ld-")))
    return list(found.values())


def _measured(source: Source, data: bytes) -> ImageFile:
    return ImageFile(path=source.path, executable=source.executable, sha384=hashlib.sha384(data).digest())


def _runtime() -> list[tuple[str, Path, bool]]:
    """The interpreter and the standard library, at the paths they have here."""
    executable = Path(interpreter())
    files = [(str(executable).lstrip("/"), executable, True)]
    standard_library = Path(os.__file__).resolve().parent  # of the base installation, also inside a virtual environment
    files += [(str(file).lstrip("/"), file, False) for file in _below(standard_library, _LEFT_OUT)]
    return files


def _packages() -> list[tuple[str, Path, bool]]:
    """The package moorline and the distributions a guest needs, under /moor/site."""
    own = Path(moorline.__file__).parent
    files = [
        (f"{SITE}/moorline/{file.relative_to(own)}", file, False)
        for file in _below(own, frozenset(("__pycache__",)))
        if file.relative_to(own).parts[0] not in ROOMS_LEFT_OUT
    ]
    for name in closure(DISTRIBUTIONS):
        for entry in importlib.metadata.files(name) or ():
            if ".." in entry.parts or entry.parts[0].endswith((".dist-info", ".pth")) or not _wanted(entry.name):
                continue
            files.append((f"{SITE}/{entry}", Path(str(entry.locate())), False))
    return files


def _below(directory: Path, left_out: frozenset[str]) -> list[Path]:
    found: list[Path] = []
    for parent, children, names in os.walk(directory):
        children[:] = sorted(child for child in children if child.partition("-")[0] not in left_out)
        found += [Path(parent, name) for name in names if _wanted(name) and name.partition(".")[0] not in left_out]
    return found


def _wanted(name: str) -> bool:
    return name.endswith((".py", ".so", ".der")) or ".so." in name


def closure(names: tuple[str, ...]) -> list[str]:
    """The distributions `names` and everything they require here, by their installed metadata, without extras."""
    known: dict[str, None] = {}
    waiting = list(names)
    while waiting:
        name = waiting.pop()
        key = re.sub(r"[-_.]+", "-", name).lower()
        if key in known:
            continue
        try:
            requirements = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            raise Misconfigured(
                "silicon.distribution_missing",
                "the guest runtime needs a distribution that is not installed",
                got=name,
                remedy="install moorline[server]",
            ) from None
        known[key] = None
        for requirement in requirements:
            parsed = _REQUIREMENT.fullmatch(requirement)
            if parsed is not None and "extra ==" not in (parsed[3] or "") and _installed(parsed[1]):
                waiting.append(parsed[1])
    return sorted(known)


def _installed(name: str) -> bool:
    """A requirement behind a marker that does not hold here is not installed, and then not needed."""
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _is_elf(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == b"\x7fELF"


@cache
def libraries(binaries: tuple[Path, ...]) -> tuple[Path, ...]:
    """The shared libraries these binaries load, and the loader, as the system's own loader resolves them."""
    found: set[Path] = set()
    output = subprocess.run(["ldd", *map(str, binaries)], capture_output=True, text=True, check=False).stdout  # noqa: S607
    for line in output.splitlines():
        match = _LIBRARY.search(line)
        if match is not None:
            found.add(Path(match[1]))
    if not found:
        raise Misconfigured("silicon.libraries", "ldd names no shared library of the interpreter", remedy="install libc-bin")
    return tuple(sorted(found))
