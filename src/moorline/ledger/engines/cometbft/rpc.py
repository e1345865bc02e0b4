"""The few calls to the own CometBFT's RPC: put a transaction in its mempool, and read headers with their commits.

What it answers is parsed strictly and believed no further than its signatures go (engines/cometbft/node.py).
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, Final, Self

from moorline.errors import Malformed, MoorlineError, Unavailable, from_problem
from moorline.ledger.engines.cometbft.canonical import NANOSECONDS
from moorline.ledger.engines.cometbft.commit import FOR_BLOCK, Commit, Precommit, SignedHeader
from moorline.ledger.engines.cometbft.evidence import DuplicateVote, SignedVote
from moorline.ledger.engines.cometbft.header import Header, Validator, ValidatorSet
from moorline.wire.http import HttpClient

_TIME: Final = re.compile(r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)(?:\.(\d{1,9}))?Z")
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
IN_MEMPOOL: Final = "tx already exists in cache"
FULL: Final = "mempool is full"


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """How far a node is, and whether it is still catching up."""

    height: int
    catching_up: bool
    node_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Conflicting:
    """A header that another one of its height excludes, its validators, and the height where the two chains parted."""

    signed: SignedHeader
    validators: ValidatorSet
    common_height: int


Accusation = DuplicateVote | Conflicting
"""Evidence as a block has it. Nothing is established by it: engines/cometbft/node.py makes it verifiable and verifies it."""


class CometRpc:
    """A client of one node's RPC at `url` (http://127.0.0.1:port). Use as `async with`, or call `aclose`."""

    def __init__(self, url: str, *, timeout_s: float = 10.0) -> None:
        self._client = HttpClient(url, server_name="localhost", roots_pem=b"", timeout_s=timeout_s)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close connections."""
        await self._client.aclose()

    async def submit(self, transaction: bytes) -> None:
        """Put it in the mempool; one that is there already is fine.

        Raises what the application said (`ledger.*`), or Unavailable("ledger.busy" | "peer.unreachable").
        """
        try:
            answer = await self._call("broadcast_tx_sync", tx=base64.b64encode(transaction).decode("ascii"))
        except Unavailable as error:
            if IN_MEMPOOL in (error.got or ""):
                return
            raise
        if answer.get("code"):
            raise _said(answer)

    async def signed_header(self, height: int) -> SignedHeader:
        """The header of a block with a commit for it. Raises Unavailable("comet.no_such_height")."""
        answer = await self._call("commit", height=str(height))
        try:
            return parse_signed_header(answer["signed_header"])
        except (KeyError, TypeError, ValueError) as error:
            raise _malformed(error) from None

    async def validators(self, height: int) -> ValidatorSet:
        """The validator set of a height."""
        answer = await self._call("validators", height=str(height), per_page="100")
        try:
            return _validators(answer["validators"])
        except (KeyError, TypeError, ValueError) as error:
            raise _malformed(error) from None

    async def accusations(self, height: int, keys: Mapping[bytes, bytes]) -> list[Accusation]:
        """What the block of a height holds against validators, whose public `keys` are given by their addresses.

        Raises Unavailable("comet.no_such_height"), Malformed("comet.answer_malformed").
        """
        answer = await self._call("block", height=str(height))
        try:
            chain_id = str(answer["block"]["header"]["chain_id"])
            return [_accusation(one, chain_id, keys) for one in answer["block"]["evidence"]["evidence"] or ()]
        except (KeyError, TypeError, ValueError) as error:
            raise _malformed(error) from None

    async def status(self) -> Status:
        """How far the node is."""
        answer = await self._call("status")
        try:
            return Status(
                height=int(answer["sync_info"]["latest_block_height"]),
                catching_up=bool(answer["sync_info"]["catching_up"]),
                node_id=str(answer["node_info"]["id"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise _malformed(error) from None

    async def _call(self, method: str, **params: str) -> dict[str, Any]:
        request = {"jsonrpc": "2.0", "id": 1, "method": method, "params": params}
        try:
            answer = await self._client.post_json("/", request)
        except Malformed as error:  # CometBFT answers HTTP 500 with its own JSON
            raise Unavailable("comet.rpc_failed", "CometBFT could not answer", got=error.got) from None
        if not isinstance(answer, dict):
            raise _malformed("no object")
        if "error" in answer:
            raise _failed(answer["error"])
        result = answer.get("result")
        if not isinstance(result, dict):
            raise _malformed("no result")
        return result


def parse_signed_header(item: Any) -> SignedHeader:  # noqa: ANN401 - JSON
    """From CometBFT's JSON; raises KeyError, TypeError or ValueError on anything else."""
    head, commit = item["header"], item["commit"]
    parts = commit["block_id"]["parts"]
    return SignedHeader(
        header=_header(head),
        commit=Commit(
            round=int(commit["round"]),
            parts_total=int(parts["total"]),
            parts_hash=bytes.fromhex(parts["hash"]),
            precommits=tuple(_precommit(one) for one in commit["signatures"] if one["block_id_flag"] == FOR_BLOCK),
        ),
    )


def parse_time(text: str) -> int:
    """Nanoseconds since the epoch; raises ValueError."""
    found = _TIME.fullmatch(text)
    if found is None:
        message = "not a time as CometBFT writes it"
        raise ValueError(message)
    seconds = int((datetime.fromisoformat(found[1]).replace(tzinfo=UTC) - _EPOCH).total_seconds())
    return seconds * NANOSECONDS + int((found[2] or "0").ljust(9, "0"))


def _header(head: Any) -> Header:  # noqa: ANN401 - JSON
    before = head["last_block_id"]
    return Header(
        version_block=int(head["version"]["block"]),
        version_app=int(head["version"].get("app", 0)),
        chain_id=str(head["chain_id"]),
        height=int(head["height"]),
        time_ns=parse_time(head["time"]),
        last_block_hash=bytes.fromhex(before["hash"]),
        last_parts_total=int(before["parts"]["total"]),
        last_parts_hash=bytes.fromhex(before["parts"]["hash"]),
        last_commit_hash=bytes.fromhex(head["last_commit_hash"]),
        data_hash=bytes.fromhex(head["data_hash"]),
        validators_hash=bytes.fromhex(head["validators_hash"]),
        next_validators_hash=bytes.fromhex(head["next_validators_hash"]),
        consensus_hash=bytes.fromhex(head["consensus_hash"]),
        app_hash=bytes.fromhex(head["app_hash"]),
        last_results_hash=bytes.fromhex(head["last_results_hash"]),
        evidence_hash=bytes.fromhex(head["evidence_hash"]),
        proposer_address=bytes.fromhex(head["proposer_address"]),
    )


def _precommit(one: Any) -> Precommit:  # noqa: ANN401 - JSON
    return Precommit(
        address=bytes.fromhex(one["validator_address"]),
        time_ns=parse_time(one["timestamp"]),
        signature=base64.b64decode(one["signature"]),
    )


def _accusation(item: Any, chain_id: str, keys: Mapping[bytes, bytes]) -> Accusation:  # noqa: ANN401 - JSON
    value = item["value"]
    if item["type"] == "tendermint/DuplicateVoteEvidence":
        one = value["vote_a"]
        key = keys[bytes.fromhex(one["validator_address"])]
        return _duplicate_vote(one, value["vote_b"], chain_id, key)
    if item["type"] != "tendermint/LightClientAttackEvidence":
        raise ValueError(item["type"])
    conflicting = value["ConflictingBlock"]
    return Conflicting(
        signed=parse_signed_header(conflicting["signed_header"]),
        validators=_validators(conflicting["validator_set"]["validators"]),
        common_height=int(value["CommonHeight"]),
    )


def _duplicate_vote(one: Any, other: Any, chain_id: str, key: bytes) -> DuplicateVote:  # noqa: ANN401 - JSON
    return DuplicateVote(
        chain_id=chain_id,
        public_key=key,
        kind=int(one["type"]),
        height=int(one["height"]),
        round=int(one["round"]),
        one=_vote(one),
        other=_vote(other),
    )


def _vote(item: Any) -> SignedVote:  # noqa: ANN401 - JSON
    parts = item["block_id"]["parts"]
    return SignedVote(
        block_hash=bytes.fromhex(item["block_id"]["hash"]),
        parts_total=int(parts["total"]),
        parts_hash=bytes.fromhex(parts["hash"]),
        time_ns=parse_time(item["timestamp"]),
        signature=base64.b64decode(item["signature"]),
    )


def _validators(items: Any) -> ValidatorSet:  # noqa: ANN401 - JSON
    return ValidatorSet.of(
        Validator(public_key=base64.b64decode(one["pub_key"]["value"]), power=int(one["voting_power"])) for one in items
    )


def _said(answer: dict[str, Any]) -> MoorlineError:
    try:
        return from_problem(json.loads(answer["log"]))
    except (KeyError, TypeError, ValueError):
        return Malformed(
            "comet.answer_malformed", "CometBFT refused a transaction without our reason", got=answer.get("code")
        )


def _failed(error: Any) -> MoorlineError:  # noqa: ANN401 - JSON
    detail = f"{error.get('message', '')}: {error.get('data', '')}" if isinstance(error, dict) else str(error)
    if FULL in detail:
        return Unavailable("ledger.busy", "too many transactions are waiting", remedy="send it again later")
    if "must be less than or equal to" in detail or "could not find" in detail or "is not available" in detail:
        return Unavailable("comet.no_such_height", "CometBFT has no block of this height", got=detail)
    return Unavailable("comet.rpc_failed", "CometBFT could not answer", got=detail)


def _malformed(error: object) -> Malformed:
    return Malformed("comet.answer_malformed", "CometBFT's answer cannot be read", got=type(error).__name__)
