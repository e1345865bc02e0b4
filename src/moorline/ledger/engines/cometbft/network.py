"""The CometBFT homes of all authorities of a ceremony, where they run on one machine (moor ledger up, tests)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from moorline.ledger.ceremony import Ceremony
from moorline.ledger.engines.cometbft import home
from moorline.ledger.engines.cometbft.home import Addresses


@dataclass(frozen=True, slots=True, kw_only=True)
class Ports:
    """host:port of one node's peer-to-peer and RPC interfaces."""

    p2p: str
    rpc: str


def home_of(made: Ceremony, name: str) -> Path:
    """Where an authority's node lives."""
    return made.directory / "authorities" / name / "cometbft"


def make(made: Ceremony, ports: Mapping[str, Ports]) -> dict[str, str]:
    """Write a home for each authority that has ports, every other one its peer; the ids of the nodes by name."""
    keys = {name: Ed25519PrivateKey.generate() for name in ports}
    ids = [(home.node_id(keys[name]), one.p2p) for name, one in ports.items()]
    for name, one in ports.items():
        home.make(
            home_of(made, name),
            name=name,
            genesis=made.genesis,
            key=keys[name],
            addresses=Addresses(p2p=one.p2p, rpc=one.rpc, peers=home.peers_of(ids, but=home.node_id(keys[name]))),
        )
    return {name: home.node_id(key) for name, key in keys.items()}
