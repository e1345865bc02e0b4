"""Files below a root directory, read as a stranger's: bounded, never waiting, never outside, links followed inside only.

1. A path is walked part by part. A symbolic link is followed below the root, absolute ones too; `..` stops at the root.
   At most 40 links are followed, so that a ring ends.
2. Only regular files are opened: a FIFO would wait, and opening a device can do something. The kind is looked at before
   opening and again afterwards, and opening does not block.
3. At most `cap` bytes are read. A larger file is `odd`, not a short one: half a file would be read as another file.
4. What is shown of a file is cleaned of control characters: a terminal is not to be written to by whoever made the file.

A Tree remembers what it read, so that all probes of one assessment judge the same bytes.
"""

from __future__ import annotations

import errno
import os
import stat
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Final

CAP: Final = 64 * 1024
_MAX_NAMES: Final = 8192
_MAX_LINKS: Final = 40
_EXCERPT: Final = 120


class State(StrEnum):
    """How reading ended."""

    READ = "read"
    ABSENT = "absent"
    DENIED = "denied"
    ODD = "odd"


@dataclass(frozen=True, slots=True, kw_only=True)
class Read:
    """One attempt to read `path`. `data` is empty unless `state` is READ; `why` says what stood in the way."""

    path: str
    state: State
    data: bytes = b""
    why: str = ""

    @property
    def text(self) -> str:
        """The contents as text without surrounding blanks; bytes that are no UTF-8 are shown escaped."""
        return self.data.decode("utf-8", "backslashreplace").strip()

    @property
    def ok(self) -> bool:
        """Whether there are contents to judge."""
        return self.state is State.READ

    def shown(self, what: str | None = None) -> str:
        """A line of evidence: the path, and `what` of it or its beginning."""
        said = what if what is not None else self.text if self.ok else self.why
        return f"{self.path}: {cleaned(said)}"


class Tree:
    """The files below `root`."""

    def __init__(self, root: Path = Path("/")) -> None:
        self.root = root
        self.live = root.resolve() == Path("/")
        self._held: dict[tuple[str, int], Read] = {}

    def read(self, path: str, cap: int = CAP) -> Read:
        """The file at `path` (absolute, as the machine names it). Never raises for what it finds."""
        key = (path, cap)
        if key not in self._held:
            self._held[key] = self._read(path, cap)
        return self._held[key]

    def names(self, path: str) -> tuple[str, ...]:
        """The names in a directory, sorted; none if it is not there or cannot be listed (`state` says which)."""
        try:
            found = self._resolved(path)
            with os.scandir(found) as entries:
                names = [entry.name for entry, _ in zip(entries, range(_MAX_NAMES), strict=False)]
        except OSError:
            return ()
        return tuple(sorted(name for name in names if name.isprintable()))

    def state(self, path: str) -> State:
        """Whether something is there: READ for anything that can be looked at, whatever its kind."""
        try:
            self._resolved(path).lstat()
        except OSError as error:
            return _state_of(error)
        return State.READ

    def has(self, path: str) -> bool:
        """Whether something stands at `path`; False where looking is denied."""
        return self.state(path) is State.READ

    def link(self, path: str) -> str:
        """Where the last part of `path` points to, as the link says; empty if it is no link."""
        try:
            return str((self._resolved(path.rpartition("/")[0] or "/") / path.rpartition("/")[2]).readlink())
        except OSError:
            return ""

    def where(self, path: str) -> Path:
        """`path` on this machine, links followed below the root. Raises OSError."""
        return self._resolved(path)

    def _read(self, path: str, cap: int) -> Read:
        try:
            found = self._resolved(path)
            if not stat.S_ISREG(found.lstat().st_mode):
                return Read(path=path, state=State.ODD, why="it is not a regular file")
            handle = os.open(found, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC | os.O_NOFOLLOW)
            try:
                if not stat.S_ISREG(os.fstat(handle).st_mode):
                    return Read(path=path, state=State.ODD, why="it is not a regular file")
                data = _at_most(handle, cap + 1)
            finally:
                os.close(handle)
        except OSError as error:
            return Read(path=path, state=_state_of(error), why=_why(error))
        except ValueError:
            return Read(path=path, state=State.ODD, why="its name cannot be opened")
        if len(data) > cap:
            return Read(path=path, state=State.ODD, why=f"it is larger than {cap} bytes")
        return Read(path=path, state=State.READ, data=data)

    def _resolved(self, path: str) -> Path:
        if self.live:
            return Path(os.path.realpath(path))
        pending = [part for part in reversed(path.split("/")) if part not in ("", ".")]
        at: list[str] = []
        links = 0
        while pending:
            part = pending.pop()
            if part == "..":
                at = at[:-1]
                continue
            here = self.root.joinpath(*at, part)
            if not here.is_symlink():
                at.append(part)
                continue
            links += 1
            if links > _MAX_LINKS:
                raise OSError(errno.ELOOP, "the links form a ring")
            target = str(here.readlink())
            if target.startswith("/"):
                at = []
            pending.extend(piece for piece in reversed(target.split("/")) if piece not in ("", "."))
        return self.root.joinpath(*at)


def cleaned(text: str, most: int = _EXCERPT) -> str:
    """One printable line of at most `most` characters: what a terminal, a page or a log can be shown."""
    line = "".join(one if one.isprintable() else " " for one in text[: most * 4])
    line = " ".join(line.split())
    return line if len(line) <= most else line[: most - 1] + "…"


def _at_most(handle: int, size: int) -> bytes:
    parts: list[bytes] = []
    while size > 0:
        part = os.read(handle, min(size, 1 << 20))
        if not part:
            break
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def _state_of(error: OSError) -> State:
    if error.errno in (errno.ENOENT, errno.ENOTDIR):
        return State.ABSENT
    if error.errno in (errno.EACCES, errno.EPERM):
        return State.DENIED
    return State.ODD


def _why(error: OSError) -> str:
    if _state_of(error) is State.ABSENT:
        return "there is no such file"
    if _state_of(error) is State.DENIED:
        return "permission denied"
    return (error.strerror or type(error).__name__).lower()
