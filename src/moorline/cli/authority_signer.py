"""`moor authority signer-key`: a validator's key in a token, where nobody can copy it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moorline.cli import render
from moorline.errors import Misconfigured


def signer_key(
    config: Annotated[Path, typer.Option("--config", help="authority.toml, with a table [validator_token].")],
    *,
    make: Annotated[bool, typer.Option("--make", help="Make the key pair in the token; it must not be there yet.")] = False,
    as_json: render.AsJson = False,
) -> None:
    """Make, or show, the validator key in the token. It counts once the authorities put its public part on the ledger."""
    from moorline.services import settings
    from moorline.services.authority import Settings
    from moorline.services.authority_cometbft import open_validator_token

    found = settings.load(Settings, config, service="authority")
    where = found.validator_token
    if where is None:
        raise Misconfigured(
            "comet.no_signer", "these settings name no token", got=config, remedy="add a table [validator_token]"
        )
    with open_validator_token(where) as token:
        public = token.generate_ed25519_key(where.key) if make else token.ed25519_public(where.key)
    render.facts({"authority": found.name, "key": where.key, "public": public.hex()}, as_json=as_json)
