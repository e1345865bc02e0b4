"""Blocks: making one, executing one again, and the receipt a sender gets. Pure.

The log of the ledger is an RFC 6962 tree whose leaf n is the encoded header of block n; block 0 follows from the genesis.
A header commits to the transactions (RFC 6962 over their bytes), to the state after them and to the header before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Final

from moorline.audit import merkle
from moorline.digest import tagged_hash
from moorline.errors import Malformed, NotAuthentic, Refused
from moorline.ledger import anchor
from moorline.ledger import state as machine
from moorline.ledger.checkpoint import Checkpoint, authority_set_digest
from moorline.ledger.engines.cometbft import receipts as comet_receipts
from moorline.ledger.genesis import Genesis
from moorline.ledger.light_client import LedgerTrust
from moorline.ledger.state import Applied, Rejected, State
from moorline.ledger.verified import Verified
from moorline.wire import cbor, schema
from moorline.wire.schema import Bytes32, Size

MAX_TRANSACTIONS: Final = 1000
MAX_BLOCK_BYTES: Final = 8 << 20
MAX_BATCH_BYTES: Final = 7 << 20
_FIELDS: Final = b"\xa8"  # a map of eight
_DIGEST: Final = b"\x58\x20"  # a string of 32 bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """What a block says of itself."""

    height: int
    time_ms: int
    previous: Bytes32
    transactions_root: Bytes32
    transactions_count: int
    state_root: Bytes32
    authorities: Bytes32


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """A header and the transactions, all of which applied, in order."""

    header: Header
    transactions: tuple[bytes, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """Where a ledger stands: the state, the log's edge, the last header's digest and its audit path in the log.

    `authorities` is the digest of the set in force after the block, as its header has it.
    """

    state: State
    frontier: merkle.Frontier
    digest: bytes
    leaf: bytes
    log_proof: tuple[bytes, ...]
    authorities: bytes

    @property
    def edge(self) -> bytes:
        """The subtrees of the log before this block, largest first, 32 bytes each."""
        return b"".join(reversed(self.log_proof))

    def checkpoint(self) -> Checkpoint:
        """What authorities sign for this head."""
        return Checkpoint(
            ledger_id=self.state.ledger_id,
            size=self.frontier.size,
            root=self.frontier.root(),
            height=self.state.height,
            time_ms=self.state.time_ms,
            state_root=self.state.root,
            authorities=self.authorities,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Receipt:
    """Proof that a transaction stands in the ledger: in its block, and the block in the log that `note` commits to."""

    height: int
    time_ms: int
    transaction: Bytes32
    note: Annotated[bytes, Size(at_most=16 * 1024)]
    header: Annotated[bytes, Size(at_most=1024)]
    index: int
    block_proof: tuple[Bytes32, ...]
    log_proof: tuple[Bytes32, ...]


def genesis_head(genesis: Genesis) -> Head:
    """Block 0."""
    state = machine.initial(genesis)
    return _head(state, _header(state, bytes(32), ()), merkle.Frontier())


def genesis_header(genesis: Genesis) -> Header:
    """The header of block 0, which nobody signs and everybody knows."""
    return _header(machine.initial(genesis), bytes(32), ())


def resumed_head(state: State, header: Header, edge: bytes) -> Head:
    """A head from what was stored; `edge` is that of the log before it. The caller compares it with the signed note."""
    head = _head(state, header, frontier_of(header.height, edge))
    return replace(head, authorities=authority_set_digest(state.authority_set()))  # the state's, whatever the header says


def frontier_of(size: int, edge: bytes) -> merkle.Frontier:
    """The log's frontier after `size` blocks from the hashes of its subtrees; raises Malformed("ledger.block_malformed")."""
    if len(edge) != merkle.HASH_BYTES * size.bit_count():
        raise Malformed(
            "ledger.block_malformed",
            "the edge of the log does not fit its size",
            expected=merkle.HASH_BYTES * size.bit_count(),
            got=len(edge),
        )
    return merkle.Frontier(size, tuple(edge[at : at + merkle.HASH_BYTES] for at in range(0, len(edge), merkle.HASH_BYTES)))


def make(
    head: Head, batch: Sequence[bytes], *, time_ms: int, verified: Verified | None = None
) -> tuple[Block, Head, tuple[Applied | Rejected, ...]]:
    """The next block with those of the batch that apply, the head after it, and what came of each of the batch.

    `verified` spares signatures that held before; it changes no outcome.
    """
    executed = machine.execute(head.state, batch, time_ms=time_ms, verified=verified)
    applied = tuple(data for data, outcome in zip(batch, executed.outcomes, strict=True) if isinstance(outcome, Applied))
    header = _header(executed.state, head.digest, applied)
    after = _head(executed.state, header, head.frontier)
    return Block(header=header, transactions=applied), after, executed.outcomes


def execute_again(head: Head, block: Block, *, verified: Verified | None = None) -> tuple[Head, tuple[Applied, ...]]:
    """The head after this block, computed from nothing but the own head; every claim of the header is compared.

    Raises Refused: "ledger.wrong_height" | "ledger.wrong_previous" | "ledger.time_not_rising" | "ledger.block_invalid" |
    "ledger.wrong_state_root". It does not say whether anybody signed the block, nor whether its time is right. `verified` is
    as for `make`.
    """
    header = block.header
    if header.height != head.state.height + 1:
        raise Refused("ledger.wrong_height", "the block is not the next", expected=head.state.height + 1, got=header.height)
    if header.previous != head.digest:
        raise Refused("ledger.wrong_previous", "the block follows another one", expected=head.digest, got=header.previous)
    if header.time_ms <= head.state.time_ms:
        raise Refused(
            "ledger.time_not_rising", "block time must rise", expected=f"> {head.state.time_ms}", got=header.time_ms
        )
    executed = machine.execute(head.state, block.transactions, time_ms=header.time_ms, verified=verified)
    applied = []
    for outcome in executed.outcomes:
        if isinstance(outcome, Rejected):
            raise Refused("ledger.block_invalid", "the block holds a transaction that does not apply", got=outcome.code)
        applied.append(outcome)
    expected = _header(executed.state, head.digest, block.transactions)
    if header.state_root != expected.state_root:
        raise Refused(
            "ledger.wrong_state_root",
            "executing the block again gives another state",
            expected=expected.state_root,
            got=header.state_root,
            remedy="one of the two authorities has a damaged database or another version",
        )
    if header != expected:
        raise Refused("ledger.block_invalid", "the header does not match its block")
    return _head(executed.state, header, head.frontier), tuple(applied)


def verify_body(block: Block) -> None:
    """Raises NotAuthentic("ledger.block_invalid") unless the transactions are those that the header commits to."""
    found = merkle.root([merkle.leaf_hash(data) for data in block.transactions])
    if (found, len(block.transactions)) != (block.header.transactions_root, block.header.transactions_count):
        raise NotAuthentic("ledger.block_invalid", "the block's transactions are not those of its header")


def digest(header: Header) -> bytes:
    """What the next block's `previous` holds; 32 bytes."""
    return tagged_hash("ledger-header", schema.encode(header))


def leaf_of(header: Header) -> bytes:
    """The block's leaf in the log; 32 bytes."""
    return merkle.leaf_hash(schema.encode(header))


def log_root(header: Header, edge: bytes) -> bytes:
    """The root of the log up to this block, if `edge` is that of the log before it. Raises Malformed."""
    return frontier_of(header.height, edge).appended(leaf_of(header)).root()


def encode(block: Block) -> bytes:
    """Deterministic CBOR."""
    return schema.encode(block)


def parse(data: bytes) -> Block:
    """A block from its bytes; raises only Malformed. Establishes nothing."""
    block = schema.decode(Block, data, max_bytes=MAX_BLOCK_BYTES)
    if len(block.transactions) > MAX_TRANSACTIONS:
        raise Malformed("ledger.block_malformed", "the block holds too many transactions", expected=MAX_TRANSACTIONS)
    return block


def receipts(log_proof: tuple[bytes, ...], block: Block, *, note: bytes, transaction_ids: Sequence[bytes]) -> list[Receipt]:
    """The receipts for all transactions of a block, in order; `log_proof` is its head's."""
    header = schema.encode(block.header)
    paths = merkle.every_inclusion_proof([merkle.leaf_hash(data) for data in block.transactions])
    return [
        Receipt(
            height=block.header.height,
            time_ms=block.header.time_ms,
            transaction=transaction_id,
            note=note,
            header=header,
            index=index,
            block_proof=path,
            log_proof=log_proof,
        )
        for index, (transaction_id, path) in enumerate(zip(transaction_ids, paths, strict=True))
    ]


def encoded_receipts(
    log_proof: tuple[bytes, ...], block: Block, *, note: bytes, transaction_ids: Sequence[bytes]
) -> list[bytes]:
    """As `receipts`, as they travel. What is the same in all of a block's is encoded once."""
    paths = merkle.every_inclusion_proof([merkle.leaf_hash(data) for data in block.transactions])
    header = block.header
    # A map in deterministic encoding: its fields in the order of their names' lengths, then of their names.
    before = _FIELDS + _encoded("note", note) + cbor.encode("index")
    between = (
        _encoded("header", schema.encode(header))
        + _encoded("height", header.height)
        + _encoded("time_ms", header.time_ms)
        + _encoded("log_proof", list(log_proof))
        + cbor.encode("block_proof")
    )
    after = cbor.encode("transaction") + _DIGEST
    return [
        b"".join((before, cbor.encode_ordered(index), between, cbor.encode_ordered(path), after, transaction_id))
        for index, (transaction_id, path) in enumerate(zip(transaction_ids, paths, strict=True))
    ]


def _encoded(name: str, value: object) -> bytes:
    return cbor.encode(name) + cbor.encode(value)


def parse_receipt(data: bytes) -> Receipt:
    """A receipt from its bytes; raises only Malformed."""
    return schema.decode(Receipt, data)


def verify_receipt(found: Receipt, transaction: bytes, trust: LedgerTrust) -> Checkpoint:
    """The checkpoint under which this very transaction stands in the ledger for good.

    For a client that knows the authority set in force at that block. Raises Malformed, NotAuthentic (`ledger.*`,
    `merkle.*`).
    """
    head = anchor.parse(found.note)
    if head.checkpoint.ledger_id != trust.ledger_id:
        raise NotAuthentic("ledger.other_ledger", "the receipt is of another ledger")
    checkpoint = anchor.verify(head, trust.authorities, trust.quorum)
    if isinstance(head, anchor.CometAnchor):
        comet_receipts.verify(found, transaction, head)
        return checkpoint
    header = schema.decode(Header, found.header)
    if (header.height, header.time_ms, found.height, found.time_ms) != (
        checkpoint.height,
        checkpoint.time_ms,
        checkpoint.height,
        checkpoint.time_ms,
    ):
        raise NotAuthentic("ledger.proof_invalid", "the receipt's header is not the signed one")
    merkle.verify_inclusion(
        merkle.leaf_hash(transaction), found.index, header.transactions_count, found.block_proof, header.transactions_root
    )
    leaf = merkle.leaf_hash(found.header)
    merkle.verify_inclusion(leaf, checkpoint.height, checkpoint.size, found.log_proof, checkpoint.root)
    return checkpoint


def _header(state: State, previous: bytes, transactions: Sequence[bytes]) -> Header:
    return Header(
        height=state.height,
        time_ms=state.time_ms,
        previous=previous,
        transactions_root=merkle.root([merkle.leaf_hash(data) for data in transactions]),
        transactions_count=len(transactions),
        state_root=state.root,
        authorities=authority_set_digest(state.authority_set()),
    )


def _head(state: State, header: Header, frontier: merkle.Frontier) -> Head:
    encoded = schema.encode(header)
    leaf = merkle.leaf_hash(encoded)
    return Head(
        state=state,
        frontier=frontier.appended(leaf),
        digest=tagged_hash("ledger-header", encoded),
        leaf=leaf,
        # The last leaf's audit path is the edge of the tree before it, smallest subtree first (RFC 6962 2.1.1).
        log_proof=tuple(reversed(frontier.subtrees)),
        authorities=header.authorities,
    )
