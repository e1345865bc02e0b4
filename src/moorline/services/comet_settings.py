"""What an authority of the CometBFT engine is told, apart from the engine: without it nobody needs protobuf."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class ValidatorToken:
    """The table [validator_token]: the validator's key is in a PKCS#11 token."""

    token_module: str
    """Path of the token's PKCS#11 module."""
    token_label: str
    """Label of the token."""
    token_pin_file: Path
    """File with the user PIN (0600)."""
    key: str = "validator"
    """Label of the Ed25519 key pair in the token (moor authority signer-key)."""
    softhsm_conf: Path | None = None
    """Configuration of SoftHSM, where that is the module."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CometSettings:
    """The table [cometbft] of authority.toml: this authority runs the CometBFT engine."""

    home: Path
    """CometBFT's home folder (moor ledger up, moor init authority)."""
    rpc: str
    """Where its RPC serves, address:port; loopback."""
    program: str | None = None
    """The cometbft to run; the one ./dev built, or the one on the PATH, if left out."""
    snapshot_every: int = 1000
    """A snapshot of the state is made every so many blocks, for authorities that begin late; 0 for never."""
