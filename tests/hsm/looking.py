"""Issuing CAs of tests to which a look at the ledger is no matter."""

from __future__ import annotations

from typing import Any

from cryptography import x509

from moorline.clock import Instant
from moorline.hsm.issuers import Looks
from moorline.hsm.issuing import IssuingCa
from moorline.hsm.token import Token


def issuing_ca(
    token: Token, certificate: x509.Certificate, above: tuple[bytes, ...], *, life_s: int = 3600, **more: Any
) -> IssuingCa:
    """One of alpha.test with the key in a token, found active on the ledger, for good."""
    named = {"certificate": certificate, "above": above, "trust_domain": "alpha.test", "life_s": life_s, **more}
    ca = IssuingCa(token, looks=Looks(last_s=1 << 40, every_s=1), **named)
    ca.issuers.looked(frozenset(), at=Instant(0))
    return ca
