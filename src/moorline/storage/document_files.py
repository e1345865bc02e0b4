"""Small documents of a service that has no database, one file each; a file is replaced as a whole or not at all."""

from __future__ import annotations

from pathlib import Path

from moorline.storage import whole_files


class DocumentFiles:
    """Documents in one directory, which is made when the first one is written. Names are ours."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def document(self, name: str) -> bytes | None:
        """Stored bytes, or None."""
        try:
            return (self._directory / name).read_bytes()
        except FileNotFoundError:
            return None

    def set_document(self, name: str, value: bytes) -> None:
        """Store bytes under a name."""
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        whole_files.replace(self._directory / name, value)
