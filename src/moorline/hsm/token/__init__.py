"""A PKCS#11 token: keys that are used by name and never shown. Module path, label or slot, and PIN source are all it needs.

`port` says what Moorline asks of a token, `local` does it in this process, `remote` asks the process that owns it.
"""

from moorline.hsm.token.local import LocalToken, open_token
from moorline.hsm.token.location import TokenLocation
from moorline.hsm.token.port import KeyFacts, Token
from moorline.hsm.token.remote import RemoteToken
from moorline.hsm.token.softhsm import SOFTHSM_MODULES, initialise_softhsm, initialise_token, softhsm_module

__all__ = (
    "SOFTHSM_MODULES",
    "KeyFacts",
    "LocalToken",
    "RemoteToken",
    "Token",
    "TokenLocation",
    "initialise_softhsm",
    "initialise_token",
    "open_token",
    "softhsm_module",
)
