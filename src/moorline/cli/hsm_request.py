"""What a new HSM asks its provider to certify: request.json, written where the token is, read where the provider's key is.

It holds public keys and addresses only. Nothing in it is authentic by itself: whoever signs it has it from the HSM's own
people.
"""

from __future__ import annotations

import base64
import binascii
import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from moorline.cli import render
from moorline.errors import Malformed

if TYPE_CHECKING:
    from moorline.hsm.ceremony import HsmPublicKeys

FILE: Final = "request.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class HsmRequest:
    """Names, addresses and public keys (base64) of one HSM."""

    provider: str
    trust_domain: str
    hsm: str
    issuing_ca: str
    sessions: str
    https: str
    identity_key: str
    issuing_ca_key: str
    verifier_key: str
    kem_key: str

    def keys(self) -> HsmPublicKeys:
        """The public keys. Raises Malformed."""
        from moorline.hsm.ceremony import HsmPublicKeys
        from moorline.wire import keys

        return HsmPublicKeys(
            identity=keys.parse_public(_bytes(self.identity_key)),
            issuing_ca=keys.parse_public(_bytes(self.issuing_ca_key)),
            verifier=keys.parse_public(_bytes(self.verifier_key)),
            kem=_bytes(self.kem_key),
        )

    def render(self) -> bytes:
        """As the file has it."""
        return (json.dumps(asdict(self), indent=1) + "\n").encode()


def make(public: HsmPublicKeys, **names: str) -> HsmRequest:
    """The request of an HSM with these keys."""
    from moorline.wire import keys

    return HsmRequest(
        identity_key=_text(keys.public_bytes(public.identity)),
        issuing_ca_key=_text(keys.public_bytes(public.issuing_ca)),
        verifier_key=_text(keys.public_bytes(public.verifier)),
        kem_key=_text(public.kem),
        **names,
    )


def read(path: Path) -> HsmRequest:
    """The request in a file. Raises Malformed("hsm.request_malformed")."""
    try:
        found: Any = json.loads(render.read(path))
    except ValueError:
        found = None
    names = {field.name for field in fields(HsmRequest)}
    if not isinstance(found, dict) or set(found) != names or not all(isinstance(value, str) for value in found.values()):
        raise Malformed(
            "hsm.request_malformed",
            "the file is not an HSM's request",
            expected=", ".join(sorted(names)),
            got=path,
            remedy="take the request.json that moor init broker wrote",
        )
    return HsmRequest(**found)


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def _bytes(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except binascii.Error:
        raise Malformed("hsm.request_malformed", "a key of the request is not base64") from None
