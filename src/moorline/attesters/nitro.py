"""AWS Nitro: whether this is an enclave. Asking its security module for a document is not implemented here.

The module is asked through an ioctl on /dev/nsm (aws-nitro-enclaves-nsm-api), which exists in Nitro enclaves only: code for
it could not be run here once, so there is none. Documents that were collected otherwise are verified like all others.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final, NoReturn

from moorline.errors import Unavailable

NSM_PATH: Final = Path("/dev/nsm")


def is_enclave(path: Path = NSM_PATH) -> bool:
    """True if there is a Nitro security module."""
    return path.exists()


def document(*, path: Path = NSM_PATH) -> NoReturn:
    """Raises Unavailable("nitro.no_module") outside of an enclave, and Unavailable("nitro.not_collected") inside."""
    if not is_enclave(path):
        raise Unavailable("nitro.no_module", "this is no Nitro enclave", expected=path)
    raise Unavailable(
        "nitro.not_collected",
        "this version cannot ask the Nitro security module",
        remedy="collect the document with AWS's library, then appraise it here",
    )
