"""A disk that is soon full, for tests of several rooms."""

import contextlib
import subprocess


@contextlib.contextmanager
def small_disk(where):
    """A file system of 2 MiB."""
    where.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(where)], check=True)
    try:
        yield where
    finally:
        subprocess.run(["umount", "-l", str(where)], check=False)
