"""As whom an operator asks services: certificate, key and roots, by files or by the operator.toml that names them."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import TYPE_CHECKING

from moorline.cli import render
from moorline.errors import Misconfigured

if TYPE_CHECKING:
    from moorline.wire.http import ClientIdentity


def read(path: Path) -> tuple[ClientIdentity, bytes]:
    """Identity and roots of an operator, from the same file as moor vnf; what else is in it is not looked at.

    Raises Misconfigured("audit.operator" | "cli.file").
    """
    try:
        named = tomllib.loads(render.read(path).decode("utf-8"))
        roots, chain, key = (path.parent / named[name] for name in ("roots", "certificate_chain", "private_key"))
    except (KeyError, TypeError, ValueError) as error:
        raise Misconfigured(
            "audit.operator",
            "the operator's file does not say as whom",
            expected="roots, certificate_chain, private_key",
            got=error,
        ) from None
    return of_files(roots, chain, key)


def verifier_at(at: str) -> tuple[str, str]:
    """URL and server name of a verifier as people write it. Raises Misconfigured("cli.verifier_address")."""
    url, separator, name = at.partition("|")
    if not separator or not url.startswith("https://"):
        raise Misconfigured(
            "cli.verifier_address",
            "not where a verifier is",
            expected="https://ADDRESS:PORT|SERVER-NAME",
            got=at,
            remedy="quote it in the shell: --at 'https://127.0.0.1:7400|v1.verifier.alpha.test'",
        )
    return url, name


def of_files(roots: Path, chain: Path, key: Path) -> tuple[ClientIdentity, bytes]:
    """Identity and roots in these files, PEM."""
    from moorline.wire.http import ClientIdentity

    identity = ClientIdentity(certificate_chain_pem=render.read(chain), private_key_pem=render.read(key))
    return identity, render.read(roots)
