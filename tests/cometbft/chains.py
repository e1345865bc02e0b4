"""CometBFT chains made of real keys, block by block, and every way to make one wrong."""

import hashlib
from dataclasses import dataclass, field, replace

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from moorline.ledger.anchor import COMETBFT, CometAnchor
from moorline.ledger.engines.cometbft import canonical, header
from moorline.ledger.engines.cometbft.commit import Commit, Precommit, SignedHeader
from moorline.ledger.engines.cometbft.header import Header, Validator, ValidatorSet
from moorline.ledger.engines.cometbft.verifier import LightBlock, Rules

GENESIS_NS = 1_790_000_000 * canonical.NANOSECONDS
LEDGER = hashlib.sha256(b"a ledger").digest()
CHAIN = header.chain_id_of(LEDGER)
DAY_S = 86_400


def digest(text):
    return hashlib.sha256(text.encode()).digest()


def key_of(name):
    return Ed25519PrivateKey.from_private_bytes(digest(f"key of {name}"))


def public_of(name):
    return key_of(name).public_key().public_bytes_raw()


def set_of(names, powers=None):
    return ValidatorSet.of(
        Validator(public_key=public_of(name), power=(powers or {}).get(name, header.AUTHORITY_POWER)) for name in names
    )


def authorities(names):
    return {name: public_of(name) for name in names}


def precommit(signed, name, *, late_ns=0):
    """This validator's signature for the header, and the time it says."""
    at = signed.header.time_ns + 1_000_000 + late_ns
    blank = Precommit(address=header.address_of(public_of(name)), time_ns=at, signature=bytes(64))
    return replace(blank, signature=key_of(name).sign(signed.sign_bytes(blank)))


def signed_by(found, names, *, round_=0):
    commit = Commit(round=round_, parts_total=1, parts_hash=digest(f"parts of {found.height}"), precommits=())
    signed = SignedHeader(header=found, commit=commit)
    return replace(signed, commit=replace(commit, precommits=tuple(precommit(signed, name) for name in names)))


@dataclass
class Chain:
    """A chain whose validators are named; `sets[h]` are those of height h."""

    sets: dict[int, tuple[str, ...]]
    label: str = "state"
    powers: dict[str, int] = field(default_factory=dict)
    blocks: dict[int, LightBlock] = field(default_factory=dict)
    root_of: dict[int, bytes] = field(default_factory=dict)
    data_of: dict[int, bytes] = field(default_factory=dict)

    def names(self, height):
        return self.sets[max(at for at in self.sets if at <= height)]

    def header(self, height):
        before = self.blocks.get(height - 1)
        here, after = (set_of(self.names(at), self.powers) for at in (height, height + 1))
        return Header(
            version_block=11,
            version_app=1,
            chain_id=CHAIN,
            height=height,
            time_ns=GENESIS_NS + height * canonical.NANOSECONDS + 7,
            last_block_hash=before.signed.header.hash() if before else b"",
            last_parts_total=1 if before else 0,
            last_parts_hash=before.signed.commit.parts_hash if before else b"",
            last_commit_hash=digest(f"last commit {height}"),
            data_hash=self.data_of.get(height, digest("no data")),
            validators_hash=here.hash(),
            next_validators_hash=after.hash(),
            consensus_hash=digest("consensus"),
            app_hash=self.root_of.get(height, digest(f"{self.label} {height}")),
            last_results_hash=digest("results"),
            evidence_hash=digest("no evidence"),
            proposer_address=here.validators[0].address,
        )

    def make(self, height, *, signers=None, round_=0, **changes):
        found = replace(self.header(height), **changes)
        signed = signed_by(found, self.names(height) if signers is None else signers, round_=round_)
        return LightBlock(
            signed=signed,
            validators=set_of(self.names(height), self.powers),
            next_validators=set_of(self.names(height + 1), self.powers),
        )

    def grow(self, to):
        for height in range(len(self.blocks) + 1, to + 1):
            self.blocks[height] = self.make(height)
        return self


def rules(chain, *, height=None, period_s=14 * DAY_S, after_s=2):
    last = chain.blocks[height or max(chain.blocks)].signed.header.time_ns
    return Rules(trusting_period_s=period_s, now_ns=last + after_s * canonical.NANOSECONDS)


def anchored(block):
    return CometAnchor(form=COMETBFT, signed=block.signed)
