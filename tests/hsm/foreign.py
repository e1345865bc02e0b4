"""What stories with foreign clients share."""

from __future__ import annotations

import subprocess


def openssl(folder, *words, check=False):
    """Debian's openssl, in a folder."""
    return subprocess.run(["openssl", *words], cwd=folder, capture_output=True, text=True, check=check, timeout=60)
