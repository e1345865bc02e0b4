"""Setting an HSM up once: a token, its keys, and what the provider needs to certify them.

Keys are generated in the token and never leave it. What comes out is public.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from moorline.hsm.backup import new_token
from moorline.hsm.custody import Circle
from moorline.hsm.keys import (
    HSM_IDENTITY,
    ISSUING_CA,
    KEM,
    VERIFIER,
    WRAPPING,
    point_key,
)
from moorline.hsm.token import Token, TokenLocation, initialise_softhsm, open_token
from moorline.wire import keys

_ONE_AT_A_TIME: Final = threading.Lock()  # a process has one token directory open at a time (hsm.token)


@dataclass(frozen=True, slots=True, kw_only=True)
class HsmPublicKeys:
    """The public halves. `kem` is the raw 65-byte P-256 point, the others sign (ES256)."""

    identity: keys.PublicKey
    issuing_ca: keys.PublicKey
    verifier: keys.PublicKey
    kem: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Ceremony:
    """A token that is ready, and its public keys."""

    location: TokenLocation
    keys: HsmPublicKeys


def initialise(directory: Path, *, label: str, circle: Circle | None = None) -> Ceremony:
    """A new SoftHSM token below `directory` with a provider's keys. For another HSM, call `generate_keys` on its token.

    With a circle of custodians the keys can be backed up and restored by a quorum (hsm.backup); without one they never
    leave the token. Raises Misconfigured (`token.*`).
    """
    with _ONE_AT_A_TIME:
        if circle is None:
            location = initialise_softhsm(directory, label=label)
        else:
            location, _ = new_token(directory.resolve(), label, circle)
        with open_token(location) as token:
            return Ceremony(location=location, keys=generate_keys(token, recoverable=circle is not None))


def generate_keys(token: Token, *, recoverable: bool = False) -> HsmPublicKeys:
    """All long-lived keys of an HSM, made in an empty token. Raises Misconfigured("token.key_exists") on a used one."""
    for label in (HSM_IDENTITY, ISSUING_CA, VERIFIER):
        token.generate_ec_key(label, recoverable=recoverable)
    token.generate_ec_key(KEM, derive=True, recoverable=recoverable)
    token.generate_wrapping_key(WRAPPING, recoverable=recoverable)
    return public_keys(token)


def public_keys(token: Token) -> HsmPublicKeys:
    """The public keys of a token that was set up before."""
    return HsmPublicKeys(
        identity=point_key(token.ec_point(HSM_IDENTITY)),
        issuing_ca=point_key(token.ec_point(ISSUING_CA)),
        verifier=point_key(token.ec_point(VERIFIER)),
        kem=token.ec_point(KEM),
    )
