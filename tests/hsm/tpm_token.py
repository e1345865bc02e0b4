"""A second PKCS#11 module for the tests: Debian's tpm2-pkcs11 over a swtpm."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization

from moorline.hsm.token import TokenLocation, initialise_token

MODULE = "/usr/lib/x86_64-linux-gnu/libtpm2_pkcs11.so.1"


def point_of(key) -> bytes:
    """The 65-byte point of a software key."""
    return key.public_key().public_bytes(serialization.Encoding.X962, serialization.PublicFormat.UncompressedPoint)


@contextlib.contextmanager
def running(directory: Path) -> Iterator[TokenLocation]:
    """A swtpm of its own with an initialised PKCS#11 token in it."""
    if not Path(MODULE).exists() or shutil.which("swtpm") is None:
        pytest.skip("libtpm2-pkcs11-1 or swtpm is not installed")
    store, state, path = directory / "store", directory / "state", directory / "s"
    for folder in (store, state):
        folder.mkdir()
    command = [*("swtpm", "socket", "--tpm2", "--tpmstate", f"dir={state}", "--flags", "not-need-init,startup-clear")]
    command += ["--server", f"type=unixio,path={path}", "--ctrl", f"type=unixio,path={path}.ctrl"]
    process = subprocess.Popen(command)
    try:
        while not path.exists():
            assert process.poll() is None
            time.sleep(0.02)
        environment = {
            "TPM2_PKCS11_STORE": str(store),
            "TPM2_PKCS11_TCTI": f"swtpm:path={path}",
            "TPM2_PKCS11_LOG_LEVEL": "0",
            "TSS2_LOG": "all+NONE",
        }
        libc = ctypes.CDLL(None)
        for name, value in environment.items():  # before the libraries read them
            libc.setenv(name.encode(), value.encode(), 1)
        location = TokenLocation(module=MODULE, label="tpm", pin_file=directory / "pin", environment=environment)
        initialise_token(location)
        yield location
    finally:
        process.terminate()
        process.wait(10)
        for name in ("TPM2_PKCS11_STORE", "TPM2_PKCS11_TCTI", "TPM2_PKCS11_LOG_LEVEL", "TSS2_LOG"):
            os.environ.pop(name, None)
