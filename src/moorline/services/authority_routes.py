"""The HTTPS interface of an authority.

Public routes: a transaction authenticates itself, and answers carry proofs. Routes between authorities take the client
certificate of an authority in force; those of its operator its own.
"""

from __future__ import annotations

import bisect
import functools
import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Final

from fastapi import FastAPI, Query, Request
from fastapi import Path as PathParameter
from fastapi.responses import Response

from moorline.errors import Malformed, Refused
from moorline.ledger import batch, blocks
from moorline.ledger.engines.node import Node, encode_status
from moorline.ledger.engines.office import Office
from moorline.ledger.engines.proposal import Proposal
from moorline.ledger.places import SUBTREE_BITS
from moorline.nfv import Role
from moorline.services import metrics
from moorline.services.http import application, require
from moorline.services.http_short import Answering, ShortWay
from moorline.wire import cbor, schema
from moorline.wire.http import CBOR_TYPE

if TYPE_CHECKING:
    from moorline.ledger.engines.cometbft.node import CometNode, Consensus

MAX_HEIGHT: Final = (1 << 53) - 1
MAX_EVIDENCE: Final = 100
MAX_EVIDENCE_BYTES: Final = 15 << 20
"""Of an answer: what its reader takes (wire.http), and more than any one piece."""
# What the sequencer may send a cosigner; everybody else sends transactions.
BODY_CAP: Final = 2 * blocks.MAX_BLOCK_BYTES


@dataclass(frozen=True, slots=True, kw_only=True)
class Promotion:
    """What an operator says: this authority is to sequence; `again`, in a new term, if it does already."""

    sequencer: str
    again: bool


def authority_app(node: Node | CometNode, engine: Office | Consensus) -> FastAPI:
    """The HTTPS interface of an authority (docs/reference/endpoints.md)."""

    def why_not() -> str | None:
        if isinstance(node, Node) and node.conduct.halted():
            return f"the ledger forked at height {node.conduct.halted()}"
        return None if node.note is not None else "no block has been signed yet"

    short = ShortWay(functools.partial(_short_way, engine), CBOR_TYPE)
    app = application("moorline authority", body_cap=BODY_CAP, ready=why_not, short=short)
    metrics.of_authority(app, node)
    _public_routes(app, node, engine)
    if isinstance(engine, Office):
        _embedded_routes(app, engine.node)
        _authority_routes(app, engine.node, engine)
        _own_routes(app, engine.node, engine)
    return app


def _short_way(engine: Office | Consensus, target: str) -> Answering | None:
    """Who answers a POST of what comes by the thousand (services.http_short), as the routes below do."""

    async def several(body: bytes) -> bytes:
        return batch.encode_answers(await engine.submit_all(batch.parse(body), wait=True))

    if target == "/v1/transactions":
        return engine.submit
    return several if target == "/v1/transactions/batch" else None


def _public_routes(app: FastAPI, node: Node | CometNode, engine: Office | Consensus) -> None:
    @app.post("/v1/transactions")
    async def submit(
        request: Request, *, forwarded: Annotated[bool, Query(description="By an authority that does not sequence.")] = False
    ) -> Response:
        """Public: a transaction is signed by its sender. Answers with the receipt once a quorum signed."""
        data = await request.body()
        return _cbor(await (engine.submit(data, forwarded=forwarded) if isinstance(engine, Office) else engine.submit(data)))

    @app.post("/v1/transactions/batch")
    async def submit_all(
        request: Request,
        *,
        wait: Annotated[bool, Query(description="For receipts; without it, until they are in line.")] = True,
        forwarded: Annotated[bool, Query(description="By an authority that does not sequence.")] = False,
    ) -> Response:
        """Public: 1 to 256 transactions, 1 MiB in all, each as if it came alone. A receipt or a problem for each."""
        found = batch.parse(await request.body())
        if isinstance(engine, Office):
            outcomes = await engine.submit_all(found, wait=wait, forwarded=forwarded)
        else:
            outcomes = await engine.submit_all(found, wait=wait)
        return _cbor(batch.encode_answers(outcomes))

    @app.get("/v1/proof")
    async def prove(
        key: Annotated[list[str], Query(max_length=64)],
        known: Annotated[str | None, Query(pattern="^[0-9a-f]{64}$")] = None,
    ) -> Response:
        """Public: a proof bundle for the keys named, which proves itself.

        `known` is the digest of an authority set: changes before it are left out.
        """
        return _cbor(node.prove(key, known=None if known is None else bytes.fromhex(known)))

    @app.get("/v1/checkpoint")
    async def checkpoint() -> Response:
        """Public: the newest checkpoint, a signed note."""
        return Response(node.signed_note(), media_type="text/plain; charset=utf-8")

    @app.get("/v1/blocks/{height}")
    async def block(height: Annotated[int, PathParameter(ge=0, le=MAX_HEIGHT)]) -> Response:
        """Public: a block and its signed note."""
        return _cbor(node.committed(height))

    @app.get("/v1/ledger")
    async def ledger() -> Response:
        """Public: the genesis, who sequences, and how far this authority is."""
        return _cbor(encode_status(node))


def _newest(found: list[bytes]) -> list[bytes]:
    """The last of these that fit into one answer."""
    sizes = list(itertools.accumulate(len(one) for one in reversed(found[-MAX_EVIDENCE:])))
    fitting = bisect.bisect_right(sizes, MAX_EVIDENCE_BYTES)
    return found[len(found) - fitting :]


def _embedded_routes(app: FastAPI, node: Node) -> None:
    @app.get("/v1/term")
    async def term() -> Response:
        """Public: who sequences in which term, by whose word, as this authority knows it."""
        return _cbor(node.conduct.standing())

    @app.get("/v1/evidence")
    async def evidence() -> Response:
        """Public: evidence that authorities lied, as far as this authority has it; each proves itself."""
        return _cbor(cbor.encode(_newest([one.body for one in node.store.evidence()])))

    @app.get("/v1/snapshot")
    async def manifest() -> Response:
        """Public: the manifest of a snapshot of the head, which proves itself."""
        return _cbor(node.manifest())

    @app.get("/v1/snapshot/{first}")
    async def chunk(first: Annotated[int, PathParameter(ge=0, lt=1 << SUBTREE_BITS)]) -> Response:
        """Public: records of the state from a subtree on; a manifest says what they have to be."""
        return _cbor(node.chunk(first))


def _authority_routes(app: FastAPI, node: Node, office: Office) -> None:
    domain = node.genesis.consortium_domain

    def authority(request: Request) -> str:
        name: str = require(request, Role.AUTHORITY, trust_domain=domain).segments[-1]
        if name not in node.authorities():
            raise Refused("ledger.authority_unknown", "the caller is no authority in force", got=name)
        return name

    @app.post("/v1/cosign")
    async def cosign(request: Request) -> Response:
        """The sequencer only: a signature line for a block it proposes under its seal."""
        caller = authority(request)
        if caller != node.conduct.following.sequencer and node.conduct.following.term == node.conduct.word.term:
            await _asked_who_sequences(node, caller, await request.body())
        return Response(await office.cosign(await request.body()), media_type="text/plain; charset=utf-8")

    @app.post("/v1/blocks")
    async def announce(request: Request) -> Response:
        """Authorities only: a block that a quorum signed."""
        authority(request)
        await office.announce(await request.body())
        return _cbor(b"")

    @app.post("/v1/words")
    async def words(request: Request) -> Response:
        """Authorities only: the word of this authority's operator on who sequences, with what it holds, if it was given."""
        authority(request)
        return _cbor(node.promise(await request.body()))


async def _asked_who_sequences(node: Node, caller: str, body: bytes) -> None:
    """Whoever is not the sequencer known here may be that of a later term: its proposal then carries the certificate."""
    try:
        found = schema.decode(Proposal, body, max_bytes=BODY_CAP)
    except Malformed:
        found = None  # who may not propose is told that, whatever it sent
    if found is None or found.seal.name != caller or found.certificate is None:
        following = node.conduct.following
        raise Refused(
            "ledger.not_sequencer",
            "only the sequencer proposes blocks",
            expected=f"{following.sequencer} in term {following.term}",
            got=caller,
        )


def _own_routes(app: FastAPI, node: Node, office: Office) -> None:
    def own(request: Request) -> None:
        caller = require(request, Role.AUTHORITY, trust_domain=node.genesis.consortium_domain)
        if caller.segments != (node.name,):
            raise Refused("ledger.operator_only", "only this authority's own operator decides this", got=caller.segments[-1])

    @app.post("/v1/operator/promote")
    async def promote(request: Request) -> Response:
        """The authority's own key only: its operator's word on who sequences; the term it is for."""
        own(request)
        said = schema.decode(Promotion, await request.body())
        term = await office.promote(said.sequencer, again=said.again)
        return _cbor(cbor.encode({"term": term, "sequencer": said.sequencer}))

    @app.post("/v1/operator/resume")
    async def resume(request: Request) -> Response:
        """The authority's own key only: go on after a fork that halted it, because the consortium decided so."""
        own(request)
        node.conduct.halt(0)
        return _cbor(b"")


def _cbor(body: bytes) -> Response:
    return Response(body, media_type=CBOR_TYPE)
