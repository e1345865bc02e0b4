"""An application without CometBFT: blocks are decided by the test, everything else is real."""

import secrets
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding

from moorline.clock import Instant
from moorline.ledger import ceremony, transactions
from moorline.ledger.engines.cometbft.application import Application
from moorline.ledger.engines.cometbft.chain import Chain
from moorline.ledger.engines.cometbft.mempool import Mempool
from moorline.ledger.engines.cometbft.node import CometNode
from moorline.ledger.engines.cometbft.proto import abci_types_pb2 as pb
from moorline.ledger.engines.cometbft.snapshots import Snapshots
from moorline.ledger.genesis import Parameters
from moorline.ledger.transactions import Approve, Sender, SenderKind
from moorline.storage.consensus_store import open_consensus

NOW = Instant(1_790_000_000)
NAMES = ("authority-1", "authority-2", "authority-3", "authority-4")
DOMAIN = "consortium.test"


def made_at(directory: Path, *, now=NOW, names=NAMES):
    return ceremony.genesis_ceremony(
        directory,
        names=names,
        consortium_domain=DOMAIN,
        simulated_allowed=True,
        parameters=Parameters(max_age_s=30),
        addresses=dict.fromkeys(names, "127.0.0.1:1"),
        now=now,
    )


class App:
    """One authority's application with its own database."""

    def __init__(self, directory, made=None, *, confirmations=4):
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        self.made = made or made_at(directory / "consortium")
        folders = {name: self.made.directory / "authorities" / name for name in NAMES}
        self.keys = {name: ceremony.load_authority(folder) for name, folder in folders.items()}
        self.confirmations = confirmations
        self.open()

    def open(self):
        self.store = open_consensus(f"sqlite:///{self.directory / 'consensus.db'}")
        self.chain = Chain(genesis=self.made.genesis, store=self.store)
        self.mempool = Mempool(self.chain.verified)
        self.snapshots = Snapshots(self.directory / "snapshots", self.chain, self.store, self._confirm)
        self.application = Application(self.chain, self.mempool, self.snapshots)
        self.node = CometNode(name=NAMES[0], genesis=self.made.genesis, chain=self.chain, store=self.store)
        self.chain.on_commit = lambda decided: self.node.changed(decided.executed.state.height)
        self.snapshots.on_restored = self.node.refresh

    def close(self):
        self.store.close()

    def reopened(self):
        self.close()
        self.open()
        return self

    async def _confirm(self, state, digest):
        del state, digest
        return self.confirmations

    # -- asking as CometBFT does ------------------------------------------------------------------------------------------

    async def ask(self, **kind):
        (name, value), *_ = kind.items()
        request = pb.Request()
        getattr(request, name).CopyFrom(value)
        return getattr(await self.application.answer(request), name)

    async def check(self, data, *, again=False):
        kind = pb.RECHECK if again else pb.NEW
        return await self.ask(check_tx=pb.RequestCheckTx(tx=data, type=kind))

    def at(self, request, *, height=None, time_s=None):
        request.height = self.chain.state.height + 1 if height is None else height
        request.time.seconds = NOW + request.height * 10 if time_s is None else time_s
        return request

    async def prepare(self, *txs, max_bytes=1 << 20):
        request = self.at(pb.RequestPrepareProposal(txs=txs, max_tx_bytes=max_bytes))
        return list((await self.ask(prepare_proposal=request)).txs)

    async def process(self, *txs, **where):
        answer = await self.ask(process_proposal=self.at(pb.RequestProcessProposal(txs=txs), **where))
        return answer.status == pb.ResponseProcessProposal.ACCEPT

    async def finalize(self, *txs, misbehaviour=(), **where):
        request = self.at(pb.RequestFinalizeBlock(txs=txs, misbehavior=misbehaviour), **where)
        return await self.ask(finalize_block=request)

    async def block(self, *txs, **where):
        answer = await self.finalize(*txs, **where)
        await self.ask(commit=pb.RequestCommit())
        return answer

    # -- transactions -----------------------------------------------------------------------------------------------------

    def by_authority(self, name, body, **changes):
        values = {
            "sender": Sender(kind=SenderKind.AUTHORITY, name=name),
            "ledger_id": self.made.genesis.ledger_id,
            "nonce": secrets.token_bytes(32),
            "valid_until": self.chain.state.height + 100,
        }
        payload = transactions.make(body, **(values | changes))
        return transactions.sign(payload, self.keys[name].signer()), payload

    def proposal(self, action, by=NAMES[0]):
        """A signed proposal and its id."""
        data, payload = self.by_authority(by, transactions.propose(action))
        return data, transactions.proposal_id(payload)

    def approval(self, proposal, by):
        return self.by_authority(by, Approve(proposal=proposal))[0]

    def admission(self, name="alpha"):
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = ceremony.issue_provider(
            self.keys[NAMES[0]].ca, key.public_key(), name=name, trust_domain=f"{name}.test", now=NOW
        )
        return transactions.AdmitProvider(
            name=name, trust_domain=f"{name}.test", certificate=certificate.public_bytes(Encoding.DER)
        )

    async def decided(self, action, by=NAMES):
        """Propose and approve in one block each; the answer to the last."""
        data, found = self.proposal(action, by[0])
        answer = await self.block(data)
        for name in by[1:]:
            answer = await self.block(self.approval(found, name))
        return answer


def retire_last():
    return transactions.RetireAuthority(name=NAMES[3])
