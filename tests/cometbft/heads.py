"""Anchored heads for an application without CometBFT: headers with its state roots, signed by its authorities' keys."""

import hashlib
from dataclasses import replace

from apps import NAMES, NOW

from moorline.ledger.anchor import COMETBFT, CometAnchor
from moorline.ledger.engines.cometbft import header
from moorline.ledger.engines.cometbft.commit import Commit, Precommit, SignedHeader
from moorline.ledger.engines.cometbft.header import Header


def digest(text):
    return hashlib.sha256(text.encode()).digest()


def header_at(app, height, *, before=None, transactions=None, app_hash=None, signing=None, following=None, time_s=None):
    """The header that carries the state after block `height - 1`."""
    signing = signing or dict(app.made.genesis.trust().authorities)
    following = following or app.chain.state.authority_set()
    return Header(
        version_block=11,
        version_app=1,
        chain_id=header.chain_id_of(app.made.genesis.ledger_id),
        height=height,
        time_ns=(NOW + height * 10 if time_s is None else time_s) * 10**9,
        last_block_hash=before.hash() if before else digest(f"before {height}"),
        last_parts_total=1,
        last_parts_hash=digest("parts"),
        last_commit_hash=digest("last commit"),
        data_hash=header.transactions_root(transactions or ()),
        validators_hash=header.authority_validators(signing).hash(),
        next_validators_hash=header.authority_validators(following).hash(),
        consensus_hash=digest("consensus"),
        app_hash=app.chain.state.root if app_hash is None else app_hash,
        last_results_hash=digest("results"),
        evidence_hash=digest("evidence"),
        proposer_address=bytes(20),
    )


def signed(app, found, by=NAMES, *, round_=0):
    """The header with a commit by these authorities."""
    commit = Commit(round=round_, parts_total=1, parts_hash=digest("parts"), precommits=())
    blank = SignedHeader(header=found, commit=commit)
    precommits = []
    for name in by:
        key = app.keys[name].checkpoint
        address = header.address_of(key.public_key().public_bytes_raw())
        one = Precommit(address=address, time_ns=found.time_ns + 5, signature=bytes(64))
        precommits.append(replace(one, signature=key.sign(blank.sign_bytes(one))))
    return CometAnchor(form=COMETBFT, signed=replace(blank, commit=replace(commit, precommits=tuple(precommits))))


def head_after(app, *, height=None, by=NAMES, **facts):
    """The anchored head of the application's state, or of another height."""
    return signed(app, header_at(app, height or app.chain.state.height + 1, **facts), by)
