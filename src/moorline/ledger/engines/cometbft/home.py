"""The home folder of one CometBFT: its configuration, genesis and node key, made from our genesis.

config/config.toml     only what differs from CometBFT's defaults, each for a reason
config/genesis.json    chain id (our ledger id), time, validators (the founding authorities), bounds of a block
config/node_key.json   the key of its peer-to-peer address; not the validator's, which only our signer has
app.sock signer.sock   where it finds the application and the signer
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from moorline.clock import Instant, rendered
from moorline.errors import Misconfigured
from moorline.ledger.engines.cometbft.application import APP_VERSION
from moorline.ledger.engines.cometbft.header import ADDRESS_BYTES, AUTHORITY_POWER, address_of, chain_id_of
from moorline.ledger.genesis import Genesis
from moorline.ledger.transactions import MAX_TRANSACTION_BYTES

APP_SOCKET: Final = "app.sock"
SIGNER_SOCKET: Final = "signer.sock"
MAX_BLOCK_BYTES: Final = 4 << 20
EVIDENCE_BLOCKS: Final = 100_000
EVIDENCE_NS: Final = 14 * 86_400 * 1_000_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class StateSync:
    """Where to begin from: two RPC addresses at least, and a header that whoever starts this node trusts."""

    rpc_servers: tuple[str, ...]
    trust_height: int
    trust_hash: bytes
    trust_period_s: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Addresses:
    """host:port of the peer-to-peer and the RPC interface, and `id@host:port` of every other authority's node."""

    p2p: str
    rpc: str
    peers: tuple[str, ...]


def make(
    home: Path, *, name: str, genesis: Genesis, key: Ed25519PrivateKey, addresses: Addresses, sync: StateSync | None = None
) -> None:
    """Write a home. Raises Misconfigured("comet.home_taken") if the folder has a genesis of another ledger."""
    config = home / "config"
    config.mkdir(mode=0o700, parents=True, exist_ok=True)
    (home / "data").mkdir(mode=0o700, exist_ok=True)
    document = genesis_document(genesis)
    existing = config / "genesis.json"
    if existing.exists() and existing.read_text("utf-8") != document:
        raise Misconfigured("comet.home_taken", "this folder is the home of another ledger's node", got=home)
    existing.write_text(document, "utf-8")
    (config / "config.toml").write_text(config_file(name, genesis, addresses, sync), "utf-8")
    _write_private(config / "node_key.json", json.dumps({"priv_key": _private_json(key)}))


def node_id(key: Ed25519PrivateKey) -> str:
    """The id of a node, as it stands in peers' addresses: 40 hex digits."""
    return hashlib.sha256(key.public_key().public_bytes_raw()).digest()[:ADDRESS_BYTES].hex()


def genesis_document(genesis: Genesis) -> str:
    """CometBFT's genesis: it holds nothing that our genesis does not determine, so all authorities have the same."""
    validators = [
        {
            "address": address_of(one.checkpoint_key).hex().upper(),
            "pub_key": {
                "type": "tendermint/PubKeyEd25519",
                "value": base64.b64encode(one.checkpoint_key).decode("ascii"),
            },
            "power": str(AUTHORITY_POWER),
            "name": one.name,
        }
        for one in genesis.authorities
    ]
    seconds, ms = divmod(genesis.time_ms, 1000)
    document = {
        "genesis_time": rendered(Instant(seconds)).replace("Z", f".{ms:03}Z"),
        "chain_id": chain_id_of(genesis.ledger_id),
        "initial_height": "1",
        "consensus_params": {
            "block": {"max_bytes": str(MAX_BLOCK_BYTES), "max_gas": "-1"},
            "evidence": {
                "max_age_num_blocks": str(EVIDENCE_BLOCKS),
                "max_age_duration": str(EVIDENCE_NS),
                "max_bytes": str(1 << 20),
            },
            "validator": {"pub_key_types": ["ed25519"]},
            "version": {"app": str(APP_VERSION)},
            "abci": {"vote_extensions_enable_height": "0"},
        },
        "validators": validators,
        "app_hash": "",
    }
    return json.dumps(document, indent=1)


def config_file(name: str, genesis: Genesis, addresses: Addresses, sync: StateSync | None) -> str:
    """config.toml."""
    interval_ms = genesis.parameters.max_age_s * 1000 // 4
    return f"""# Written by Moorline. What is not here is CometBFT's default.
moniker = "{name}"
abci = "socket"
proxy_app = "unix://{APP_SOCKET}"
priv_validator_laddr = "unix://{SIGNER_SOCKET}" # the validator's key is our signer's alone
priv_validator_key_file = "data/unused_key.json" # CometBFT makes one whatever it is told; nobody knows it
log_level = "error"
log_format = "json"

[rpc]
laddr = "tcp://{addresses.rpc}" # loopback: clients ask the authority's own interface, which proves what it says
unsafe = false

[p2p]
laddr = "tcp://{addresses.p2p}"
persistent_peers = "{",".join(addresses.peers)}"
pex = false # the peers are the authorities, and nobody else
addr_book_strict = false # authorities may have private addresses
allow_duplicate_ip = true
flush_throttle_timeout = "10ms"
send_rate = 20480000
recv_rate = 20480000
persistent_peers_max_dial_period = "2s" # an authority that comes back is found at once

[mempool]
recheck = true
recheck_timeout = "10s" # the application is another process
size = 10000
max_txs_bytes = 268435456
cache_size = 20000
max_tx_bytes = {MAX_TRANSACTION_BYTES}
{_sync_section(sync)}
[consensus]
timeout_propose = "1500ms"
timeout_propose_delta = "500ms"
timeout_prevote = "500ms"
timeout_prevote_delta = "250ms"
timeout_precommit = "500ms"
timeout_precommit_delta = "250ms"
timeout_commit = "0s"
skip_timeout_commit = true
create_empty_blocks = true
# A header's time is that of the votes for the block before: at a quarter of max_age, a proof is half of it old at most.
create_empty_blocks_interval = "{interval_ms}ms"
peer_gossip_sleep_duration = "10ms"

[storage]
discard_abci_responses = false # needed to start again after a crash between two steps of a commit

[tx_index]
indexer = "null" # the application knows where a transaction stands

[instrumentation]
prometheus = false
"""


def _sync_section(sync: StateSync | None) -> str:
    if sync is None:
        return ""
    return f"""
[statesync]
enable = true
rpc_servers = "{",".join(sync.rpc_servers)}"
trust_height = {sync.trust_height}
trust_hash = "{sync.trust_hash.hex()}"
trust_period = "{sync.trust_period_s}s"
discovery_time = "5s"
chunk_request_timeout = "10s"
"""


def _private_json(key: Ed25519PrivateKey) -> dict[str, str]:
    raw = key.private_bytes_raw() + key.public_key().public_bytes_raw()
    return {"type": "tendermint/PrivKeyEd25519", "value": base64.b64encode(raw).decode("ascii")}


def _write_private(path: Path, text: str) -> None:
    path.unlink(missing_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(text)


def peers_of(ids: Sequence[tuple[str, str]], *, but: str) -> tuple[str, ...]:
    """`id@host:port` of every node except the one with id `but`."""
    return tuple(f"{one}@{address}" for one, address in ids if one != but)
