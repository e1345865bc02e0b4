"""The validator's key behind CometBFT's protocol for remote signers, and what keeps it from ever signing twice.

CometBFT has no key: it asks for votes and proposals over a unix socket (messages of tendermint.privval behind their length).
sign, in this order:
  1. the request is for this chain;
  2. height, round and step are later than everything signed before; or the same, and the message differs from the one signed
     in nothing but its time: then the old time is kept, so that the old signature is made again;
  3. what will be signed is on the disk, synchronised;
  4. it is signed.

A signer that is started again with its file refuses what conflicts, whoever asks. One file belongs to one key: a copy of the
key without it, or with an old one, protects nobody, which is why restoring a validator from a backup is a new validator.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

from google.protobuf.message import DecodeError
from google.protobuf.timestamp_pb2 import Timestamp

from moorline.errors import Conflict, Malformed, Misconfigured, MoorlineError, Refused
from moorline.ledger.engines.cometbft import canonical
from moorline.ledger.engines.cometbft.abci import framed, messages
from moorline.ledger.engines.cometbft.proto import privval_types_pb2 as pv
from moorline.ledger.engines.cometbft.proto import types_types_pb2 as tm
from moorline.storage import whole_files
from moorline.storage.steps import reached

MAX_REQUEST_BYTES: Final = 1 << 20
RETRY_S: Final = 0.05
STEP_PROPOSE: Final = 1
STEP_PREVOTE: Final = 2
STEP_PRECOMMIT: Final = 3
_STEPS: Final = {canonical.PREVOTE: STEP_PREVOTE, canonical.PRECOMMIT: STEP_PRECOMMIT}


class SigningKey(Protocol):
    """An Ed25519 key, in memory or in a token."""

    def public_bytes(self) -> bytes:
        """32 bytes."""
        ...

    def sign(self, message: bytes) -> bytes:
        """64 bytes."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Signed:
    """The last thing signed, or about to be. `content` is the message with its time left out, `time_ns` that time."""

    height: int
    round: int
    step: int
    content: str
    time_ns: int


class SignedFile:
    """Where `Signed` is kept: written aside, synchronised, renamed, the folder synchronised."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.last = self._read()

    def put(self, signed: Signed) -> None:
        """Durable when it returns."""
        data = json.dumps({name: getattr(signed, name) for name in Signed.__slots__}).encode()
        whole_files.replace(self._path, data, mode=whole_files.PRIVATE)
        self.last = signed

    def _read(self) -> Signed:
        if not self._path.exists():
            return Signed(height=0, round=0, step=0, content="", time_ns=0)
        try:
            found = json.loads(self._path.read_bytes())
            return Signed(**{name: kind(found[name]) for name, kind in _KINDS.items()})
        except (OSError, ValueError, KeyError, TypeError):
            raise Misconfigured(
                "comet.signer_state_unreadable",
                "what this validator signed last cannot be read",
                got=self._path,
                remedy="never delete it while its key is in use; admit a new key for this authority instead",
            ) from None


_KINDS: Final = {"height": int, "round": int, "step": int, "content": str, "time_ns": int}


class Signer:
    """Signs votes and proposals of one chain with one key, none of them twice."""

    def __init__(self, key: SigningKey, *, chain_id: str, state: SignedFile) -> None:
        self._key, self._chain_id, self._state = key, chain_id, state

    def answer(self, request: pv.Message) -> pv.Message:
        """The answer to any message of the protocol; refusals are answers too."""
        kind = request.WhichOneof("sum")
        if kind == "ping_request":
            return pv.Message(ping_response=pv.PingResponse())
        if kind == "pub_key_request":
            return self._public_key(request.pub_key_request)
        if kind == "sign_vote_request":
            return self._vote(request.sign_vote_request)
        if kind == "sign_proposal_request":
            return self._proposal(request.sign_proposal_request)
        raise Malformed("comet.signer_request", "this is no request to a signer", got=kind)

    def _public_key(self, request: pv.PubKeyRequest) -> pv.Message:
        try:
            self._of_this_chain(request.chain_id)
        except MoorlineError as error:
            return pv.Message(pub_key_response=pv.PubKeyResponse(error=_error(error)))
        response = pv.PubKeyResponse()
        response.pub_key.ed25519 = self._key.public_bytes()
        return pv.Message(pub_key_response=response)

    def _vote(self, request: pv.SignVoteRequest) -> pv.Message:
        vote = tm.Vote()
        vote.CopyFrom(request.vote)
        try:
            self._of_this_chain(request.chain_id)
            self.sign_vote(vote)
        except MoorlineError as error:
            return pv.Message(signed_vote_response=pv.SignedVoteResponse(error=_error(error)))
        return pv.Message(signed_vote_response=pv.SignedVoteResponse(vote=vote))

    def _proposal(self, request: pv.SignProposalRequest) -> pv.Message:
        proposal = tm.Proposal()
        proposal.CopyFrom(request.proposal)
        try:
            self._of_this_chain(request.chain_id)
            self.sign_proposal(proposal)
        except MoorlineError as error:
            return pv.Message(signed_proposal_response=pv.SignedProposalResponse(error=_error(error)))
        return pv.Message(signed_proposal_response=pv.SignedProposalResponse(proposal=proposal))

    def sign_vote(self, vote: tm.Vote) -> None:
        """Put time and signature into the vote. Raises Conflict("comet.double_sign"), Malformed("comet.vote_malformed")."""
        step = _STEPS.get(vote.type)
        if step is None:
            raise Malformed("comet.vote_malformed", "this is no vote", got=vote.type)
        block = _block(vote.block_id)

        def message(time_ns: int) -> bytes:
            return canonical.vote(
                vote.type,
                height=vote.height,
                round_=vote.round,
                block=block,
                time_ns=time_ns,
                chain_id=self._chain_id,
            )

        time_ns = self._once(vote.height, vote.round, step, message, _ns(vote.timestamp))
        vote.timestamp.CopyFrom(_timestamp(time_ns))
        vote.signature = self._key.sign(message(time_ns))
        if step == STEP_PRECOMMIT and block:
            vote.extension_signature = self._key.sign(
                canonical.vote_extension(
                    extension=vote.extension, height=vote.height, round_=vote.round, chain_id=self._chain_id
                )
            )
        elif vote.extension:
            raise Malformed("comet.vote_malformed", "only a precommit for a block has an extension")

    def sign_proposal(self, proposal: tm.Proposal) -> None:
        """Put time and signature into the proposal. Raises Conflict("comet.double_sign")."""
        block = _block(proposal.block_id)

        def message(time_ns: int) -> bytes:
            return canonical.proposal(
                height=proposal.height,
                round_=proposal.round,
                pol_round=proposal.pol_round,
                block=block,
                time_ns=time_ns,
                chain_id=self._chain_id,
            )

        time_ns = self._once(proposal.height, proposal.round, STEP_PROPOSE, message, _ns(proposal.timestamp))
        proposal.timestamp.CopyFrom(_timestamp(time_ns))
        proposal.signature = self._key.sign(message(time_ns))

    def _once(self, height: int, round_: int, step: int, message: Callable[[int], bytes], time_ns: int) -> int:
        """The time to sign with, once this is on the disk. Numbers are those of the module's docstring."""
        last, content = self._state.last, message(0).hex()
        if (height, round_, step) == (last.height, last.round, last.step) and content == last.content:  # 2
            return last.time_ns
        if (height, round_, step) <= (last.height, last.round, last.step):
            raise Conflict(
                "comet.double_sign",
                "something else was signed here, or later, already",
                expected=f"after {last.height}/{last.round}/{last.step}",
                got=f"{height}/{round_}/{step}",
                remedy="find out who else uses this validator's key",
            )
        self._state.put(Signed(height=height, round=round_, step=step, content=content, time_ns=time_ns))  # 3
        reached("comet.signature.intended")
        return time_ns

    def _of_this_chain(self, chain_id: str) -> None:
        if chain_id != self._chain_id:  # 1
            raise Refused("comet.other_chain", "this signer is of another chain", expected=self._chain_id, got=chain_id)


async def serve(signer: Signer, path: str, on_trouble: Callable[[str], None]) -> None:
    """Dial the CometBFT that listens on this unix socket and answer it, again whenever it hangs up, until cancelled."""
    while True:
        with contextlib.suppress(OSError):
            reader, writer = await asyncio.open_unix_connection(path)
            try:
                await converse(signer, reader, writer)
            except (OSError, Malformed, DecodeError) as error:
                on_trouble(str(error))
            finally:
                writer.close()
        await asyncio.sleep(RETRY_S)


async def converse(signer: Signer, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Answer one connection's requests until it ends."""
    async for asked in messages(reader, at_most=MAX_REQUEST_BYTES):
        for data in asked:
            request = pv.Message()
            request.ParseFromString(data)
            writer.write(framed(signer.answer(request).SerializeToString()))
        await writer.drain()


def _block(found: tm.BlockID) -> bytes:
    if not found.hash and not found.part_set_header.total and not found.part_set_header.hash:
        return b""
    return canonical.block_id(found.hash, found.part_set_header.total, found.part_set_header.hash)


def _ns(time: Timestamp) -> int:
    return time.seconds * canonical.NANOSECONDS + time.nanos


def _timestamp(time_ns: int) -> Timestamp:
    seconds, nanos = divmod(time_ns, canonical.NANOSECONDS)
    return Timestamp(seconds=seconds, nanos=nanos)


def _error(error: MoorlineError) -> pv.RemoteSignerError:
    return pv.RemoteSignerError(code=1, description=str(error))
