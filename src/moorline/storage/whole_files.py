"""Files that are there as a whole or not at all."""

from __future__ import annotations

import os
import secrets
from pathlib import Path
from typing import Final

from moorline.storage.steps import reached

PRIVATE: Final = 0o600
_PUBLIC: Final = 0o666


def replace(path: Path, data: bytes, *, mode: int = _PUBLIC) -> None:
    """`data` at `path`, as a whole and durable; its folder is made if there is none. The umask takes from `mode`.

    Whoever dies in between leaves the old file, and one beside it with a name of its own. Raises OSError.
    """
    path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    new = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode), "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        reached("file.beside")
        new.replace(path)
    finally:
        new.unlink(missing_ok=True)
    descriptor = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
