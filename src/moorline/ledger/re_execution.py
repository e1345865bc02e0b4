"""Evidence that a sealed block is not what the rules give: whoever has it executes the block again, without a ledger. Pure.

A sealed header names the header before by digest, and that one has the root of the state before. So a maker stands for the
state its block begins from as much as for the block, and the records the block touches can be shown under that root, like
those of any proof. From them and the transactions follows what the block should have been.

What is established: the maker sealed a block that holds what does not apply to the state it names itself, or states
another result than this program computes. Not established: why. A liar, a damaged database and a program with other rules
look the same (authorities change their version together, ADR 0009).

What is not under the state root cannot be shown so: a transaction that was applied in a block before (its nonce is
remembered beside the state) is refused by every honest authority, and names nobody here. Fewer nonces only ever let more
pass, so nobody is blamed for what was left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Final

from moorline.audit import merkle
from moorline.digest import same
from moorline.errors import Malformed, Refused
from moorline.ledger import blocks
from moorline.ledger.blocks import Block, Head, Header
from moorline.ledger.finding import SealedHeader
from moorline.ledger.nonces import Nonces
from moorline.ledger.partial_tree import PartialTree
from moorline.ledger.proof import Entry
from moorline.ledger.state import State
from moorline.ledger.tree import Tree
from moorline.wire import schema
from moorline.wire.schema import Size

MAX_BYTES: Final = 11 << 20
_MAX_TREE_BYTES: Final = 4 << 20
_FAULTS: Final = frozenset({"ledger.block_invalid", "ledger.wrong_state_root"})


@dataclass(frozen=True, slots=True, kw_only=True)
class WrongExecution:
    """A sealed header with all of its block, the header it follows, and what the block touches of the state there.

    `records` and `tree` are as in a proof bundle, under the state root of `previous`: exactly the keys that executing the
    transactions reads or writes.
    """

    sealed: SealedHeader
    previous: Annotated[bytes, Size(at_most=1024)]
    transactions: tuple[Annotated[bytes, Size(at_most=128 * 1024)], ...]
    records: tuple[Entry, ...]
    tree: Annotated[bytes, Size(at_most=_MAX_TREE_BYTES)]


class _NotShownError(Exception):
    """A key was asked for that the evidence does not show. Not one of ours: a rule must not take it for a refusal."""


class _Watched(Tree):
    """A tree that notes which keys are read and written, also after an update; `shown` bounds them."""

    __slots__ = ("_shown", "touched")

    touched: set[str]
    _shown: frozenset[str] | None

    def __init__(self, tree: Tree, *, shown: frozenset[str] | None = None, touched: set[str] | None = None) -> None:
        Tree.__init__(self, tree._root)  # noqa: SLF001 - of its own kind
        object.__setattr__(self, "touched", set() if touched is None else touched)
        object.__setattr__(self, "_shown", shown)

    def _touch(self, keys: Iterable[str]) -> None:
        wanted = set(keys)
        if self._shown is not None and not wanted <= self._shown:
            raise _NotShownError
        self.touched.update(wanted)

    def __getitem__(self, key: str) -> bytes:
        self._touch((key,))
        return Tree.__getitem__(self, key)

    def value(self, key: str) -> bytes | None:
        self._touch((key,))
        return Tree.value(self, key)

    def updated(self, writes: Mapping[str, bytes]) -> Tree:
        self._touch(writes)
        return _Watched(Tree.updated(self, writes), shown=self._shown, touched=self.touched)


def show(state: State, previous: Header, block: Block, sealed: SealedHeader) -> bytes | None:
    """The encoded evidence that `block` is wrong on `state`, that after `previous`; None if it is not, or is too large."""
    watched = _Watched(state.tree)
    if _fault(_head_on(watched, previous, ledger_id=state.ledger_id), block) is None:
        return None
    keys = sorted(watched.touched)
    found = WrongExecution(
        sealed=sealed,
        previous=schema.encode(previous),
        transactions=block.transactions,
        records=tuple(Entry(key=key, value=state.get(key)) for key in keys),
        tree=state.tree.prove(keys),
    )
    data = schema.encode(found)
    return data if len(data) <= MAX_BYTES and len(found.tree) <= _MAX_TREE_BYTES else None


def judge(found: WrongExecution, header: Header, *, ledger_id: bytes) -> str | None:
    """The code of the rule that the block under a sealed `header` broke; None if it broke none that can be shown.

    Raises Malformed("ledger.evidence_malformed", `ledger.*`), NotAuthentic("ledger.block_invalid") for transactions that
    are not the header's, Refused("ledger.not_proven"). Whether the seal holds is for the caller to say.
    """
    previous = schema.decode(Header, found.previous)
    if not same(blocks.digest(previous), header.previous) or header.height != previous.height + 1:
        raise _malformed("the header before is not the one that the sealed header follows")
    block = Block(header=header, transactions=found.transactions)
    blocks.verify_body(block)
    shown = frozenset(entry.key for entry in found.records)
    watched = _Watched(_proven_tree(found, previous), shown=shown)
    try:
        fault = _fault(_head_on(watched, previous, ledger_id=ledger_id), block)
    except (_NotShownError, KeyError):
        raise _malformed("it does not show all that its block touches") from None
    if watched.touched != shown:
        raise _malformed("it shows more than its block touches")
    return fault


def _proven_tree(found: WrongExecution, previous: Header) -> Tree:
    """The part of the state that is shown, once it leads to the root that the header before has."""
    tree = PartialTree.parse(found.tree, max_bytes=_MAX_TREE_BYTES)
    keys = [entry.key for entry in found.records]
    if keys != sorted(set(keys)):
        raise _malformed("keys come once, in order")
    tree.exactly_for(keys)
    if any((tree.lookup(entry.key) is None) != (entry.value is None) for entry in found.records):
        raise _malformed("it lists another state than it shows")
    filled = tree.filled({entry.key: entry.value for entry in found.records if entry.value is not None})
    if not same(filled.root, previous.state_root):
        raise _malformed("the state it shows is not the one that the block begins from")
    return filled


def _head_on(tree: Tree, previous: Header, *, ledger_id: bytes) -> Head:
    """A head to execute on. The log's edge is not known, and nothing that is compared depends on it."""
    state = State(
        ledger_id=ledger_id,
        height=previous.height,
        time_ms=previous.time_ms,
        tree=tree,
        nonces=Nonces.of({}, height=previous.height),
    )
    return Head(
        state=state,
        frontier=merkle.Frontier(),
        digest=blocks.digest(previous),
        leaf=b"",
        log_proof=(),
        authorities=previous.authorities,
    )


def _fault(head: Head, block: Block) -> str | None:
    """The code of what is wrong with this block as a result of the rules."""
    try:
        blocks.execute_again(head, block)
    except Refused as error:
        if error.code not in _FAULTS:
            return None
        return error.got if error.code == "ledger.block_invalid" and error.got else error.code
    return None


def _malformed(why: str) -> Malformed:
    return Malformed("ledger.evidence_malformed", f"the evidence cannot be read: {why}")
