"""What functions import to read the ledger loads nothing but cryptography and cbor2: guests have no more."""

import subprocess
import sys

READING = ("records", "standing", "light_client", "proof", "tree", "checkpoint")
# setuptools, which a build tool brings along, puts _distutils_hack into every process by a .pth file.
ALLOWED = {"cryptography", "cbor2", "moorline", "_cffi_backend", "_distutils_hack"}

PROGRAM = """
import importlib, sys
from importlib.metadata import packages_distributions
for name in sys.argv[1:]:
    importlib.import_module(f"moorline.ledger.{name}")
installed = set(packages_distributions())
print(" ".join(sorted({name.partition(".")[0] for name in sys.modules} & installed)))
"""


def test_reading_the_ledger_needs_the_base_install_only():
    done = subprocess.run([sys.executable, "-c", PROGRAM, *READING], capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) - ALLOWED == set()
