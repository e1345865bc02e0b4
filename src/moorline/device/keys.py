"""Where a device's key is: in a file, in a PKCS#11 token, or in a TPM. In the last two it is made there and never leaves.

`key.json` in the device's directory says where; without it the key is in `key.pem`. It holds no secret: a PIN is in a file
that it names.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from cryptography.hazmat.primitives.asymmetric import ec

from moorline.errors import Malformed

if TYPE_CHECKING:
    from moorline.hsm.token import Token

WHERE_FILE: Final = "key.json"
LABEL: Final = "device-key"
_OPEN: Final[dict[InToken, Token]] = {}


@dataclass(frozen=True, slots=True, kw_only=True)
class InToken:
    """A key pair of the label `device-key` in a PKCS#11 token."""

    module: str
    token_label: str
    pin_file: str

    def key(self) -> ec.EllipticCurvePrivateKey:
        """The key; made in the token at the first call. Raises Misconfigured or Unavailable (`token.*`)."""
        from moorline.hsm.keys import TokenEcKey

        token = _opened(self)
        if not token.has_key(LABEL):
            token.generate_ec_key(LABEL)
        return TokenEcKey(token, LABEL)


def _opened(where: InToken) -> Token:
    """The token, open until `close`: some modules let a process open a token once."""
    from moorline.hsm.token import TokenLocation, open_token

    if where not in _OPEN:
        location = TokenLocation(module=where.module, label=where.token_label, pin_file=Path(where.pin_file))
        _OPEN[where] = open_token(location, lanes=1)
    return _OPEN[where]


def close() -> None:
    """Close the tokens that keys were used from; for a process that goes on without them."""
    while _OPEN:
        _OPEN.popitem()[1].close()


@dataclass(frozen=True, slots=True, kw_only=True)
class InTpm:
    """A primary key of the TPM's owner hierarchy that follows from `name`: always the same, kept nowhere.

    `tcti` names the TPM: `device:/dev/tpmrm0`. The key has no authorisation value: whoever reaches the TPM uses it.
    """

    tcti: str
    name: str

    def key(self) -> ec.EllipticCurvePrivateKey:
        """The key. Raises Misconfigured or Unavailable (`tpm.*`)."""
        from moorline.attesters.tpm import Tpm
        from moorline.hsm.keys import HeldEcKey

        tpm = Tpm.open(self.tcti)
        return HeldEcKey(tpm.signing_point(self.name), lambda digest: tpm.sign(self.name, digest), self.name)


Where = InToken | InTpm
_KINDS: Final[dict[str, type[Where]]] = {"token": InToken, "tpm": InTpm}


def encode(where: Where) -> bytes:
    """As key.json has it."""
    kind = next(name for name, each in _KINDS.items() if isinstance(where, each))
    return (json.dumps({"kind": kind, **asdict(where)}, indent=1) + "\n").encode()


def decode(data: bytes) -> Where:
    """What key.json says. Raises Malformed("device.store_unreadable")."""
    try:
        found = json.loads(data)
        kind = _KINDS[found.pop("kind")]
        assert all(isinstance(value, str) for value in found.values())
        return kind(**found)
    except (ValueError, KeyError, TypeError, AttributeError, AssertionError) as error:
        raise Malformed(
            "device.store_unreadable", f"{WHERE_FILE} in the device's directory cannot be read", got=type(error).__name__
        ) from None
