"""The validator's signer: every message of the protocol, and that nothing makes it sign twice."""

import asyncio
import contextlib
import os
import subprocess
import sys

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from hypothesis import given
from hypothesis import strategies as st

from moorline.errors import Malformed, Misconfigured
from moorline.hsm.token import initialise_softhsm, open_token
from moorline.ledger.engines.cometbft import canonical, signer
from moorline.ledger.engines.cometbft.abci import framed, messages
from moorline.ledger.engines.cometbft.proto import privval_types_pb2 as pv
from moorline.ledger.engines.cometbft.proto import types_types_pb2 as tm
from moorline.ledger.engines.cometbft.signer import SignedFile, Signer
from moorline.services.authority_cometbft import KeyRing, TokenKey

CHAIN = "moor-chain"


class Key:
    def __init__(self):
        self.key = Ed25519PrivateKey.generate()
        self.signed = 0

    def public_bytes(self):
        return self.key.public_key().public_bytes_raw()

    def sign(self, message):
        self.signed += 1
        return self.key.sign(message)


@pytest.fixture
def key():
    return Key()


@pytest.fixture
def path(tmp_path):
    return tmp_path / "signed.json"


def made(key, path, chain=CHAIN):
    return Signer(key, chain_id=chain, state=SignedFile(path))


def vote(height, round_=0, *, kind=canonical.PRECOMMIT, block=b"a" * 32, seconds=100, extension=b""):
    found = tm.Vote(type=kind, height=height, round=round_, extension=extension)
    found.timestamp.seconds = seconds
    if block:
        found.block_id.hash = block
        found.block_id.part_set_header.total = 1
        found.block_id.part_set_header.hash = block
    return found


def proposal(height, round_=0, *, block=b"a" * 32, seconds=100):
    found = tm.Proposal(type=canonical.PROPOSAL, height=height, round=round_, pol_round=-1)
    found.timestamp.seconds = seconds
    found.block_id.hash = block
    found.block_id.part_set_header.total = 1
    found.block_id.part_set_header.hash = block
    return found


def sign(one, found, chain=CHAIN):
    if isinstance(found, tm.Vote):
        request = pv.Message(sign_vote_request=pv.SignVoteRequest(vote=found, chain_id=chain))
        return one.answer(request).signed_vote_response
    request = pv.Message(sign_proposal_request=pv.SignProposalRequest(proposal=found, chain_id=chain))
    return one.answer(request).signed_proposal_response


def test_votes_and_proposals_verify_under_the_key(key, path):
    one = made(key, path)
    public = Ed25519PublicKey.from_public_bytes(key.public_bytes())
    signed = sign(one, proposal(5)).proposal
    block = canonical.block_id(b"a" * 32, 1, b"a" * 32)
    facts = {"height": 5, "round_": 0, "block": block, "time_ns": 100 * 10**9, "chain_id": CHAIN}
    public.verify(signed.signature, canonical.proposal(pol_round=-1, **facts))
    for kind in (canonical.PREVOTE, canonical.PRECOMMIT):
        signed = sign(one, vote(5, kind=kind)).vote
        public.verify(signed.signature, canonical.vote(kind, **facts))
    extension = canonical.vote_extension(extension=b"", height=5, round_=0, chain_id=CHAIN)
    public.verify(signed.extension_signature, extension)
    nil = sign(one, vote(6, block=b"")).vote
    public.verify(nil.signature, canonical.vote(canonical.PRECOMMIT, **{**facts, "height": 6, "block": b""}))
    assert not nil.extension_signature


def test_a_signer_started_again_refuses_a_conflicting_vote(key, path):
    """verifies that: the file alone, read by a new process, keeps a key from signing two blocks at one height."""
    assert sign(made(key, path), vote(5)).vote.signature
    before = key.signed
    again = made(key, path)
    for conflicting in (
        vote(5, block=b"b" * 32),
        vote(5, block=b""),
        vote(5, kind=canonical.PREVOTE, block=b"b" * 32),
        vote(4),
        proposal(5, block=b"b" * 32),
        proposal(4),
    ):
        answer = sign(again, conflicting)
        assert "comet.double_sign" in answer.error.description
        assert key.signed == before
    assert sign(again, vote(5, 1, block=b"b" * 32)).vote.signature
    assert sign(again, vote(6, block=b"b" * 32)).vote.signature


def test_the_same_vote_again_keeps_its_first_time_and_signature(key, path):
    """verifies that: a node that crashed after signing gets the very same vote, not a second one with another time."""
    first = sign(made(key, path), vote(5, seconds=100)).vote
    again = sign(made(key, path), vote(5, seconds=207)).vote
    assert (again.timestamp, again.signature) == (first.timestamp, first.signature)
    one = made(key, path)
    first = sign(one, proposal(6, seconds=100)).proposal
    again = sign(made(key, path), proposal(6, seconds=300)).proposal
    assert (again.timestamp, again.signature) == (first.timestamp, first.signature)


CRASHING = """
import sys
from pathlib import Path
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from moorline.ledger.engines.cometbft.proto import types_types_pb2 as tm
from moorline.ledger.engines.cometbft.signer import SignedFile, Signer
class Key:
    key = Ed25519PrivateKey.from_private_bytes(bytes(32))
    def public_bytes(self): return self.key.public_key().public_bytes_raw()
    def sign(self, message): print("signed", flush=True); return self.key.sign(message)
vote = tm.Vote(type=2, height=9)
vote.block_id.hash = vote.block_id.part_set_header.hash = b"a" * 32
vote.block_id.part_set_header.total = 1
Signer(Key(), chain_id="moor-chain", state=SignedFile(Path(sys.argv[1]))).sign_vote(vote)
"""


def test_what_is_signed_is_on_the_disk_before_it_is_signed(key, path):
    """verifies that: a process killed between the two has signed nothing, and its successor refuses another block there."""
    environment = {**os.environ, "MOOR_KILL_AT": "comet.signature.intended"}
    done = subprocess.run(
        [sys.executable, "-c", CRASHING, str(path)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == -9
    assert "signed" not in done.stdout
    answer = sign(made(key, path), vote(9, block=b"b" * 32))
    assert "comet.double_sign" in answer.error.description


def test_a_file_that_cannot_be_read_is_never_an_empty_one(key, path):
    for content in (b"", b"{}", b"[]", b'{"height": "x"}'):
        path.write_bytes(content)
        with pytest.raises(Misconfigured, match="comet.signer_state_unreadable"):
            made(key, path)


def test_another_chain_and_no_vote_are_refused(key, path):
    one = made(key, path)
    assert "comet.other_chain" in sign(one, vote(5), chain="other").error.description
    assert "comet.other_chain" in sign(one, proposal(5), chain="other").error.description
    asked = one.answer(pv.Message(pub_key_request=pv.PubKeyRequest(chain_id="other")))
    assert "comet.other_chain" in asked.pub_key_response.error.description
    assert "comet.vote_malformed" in sign(one, vote(5, kind=7)).error.description
    assert "comet.vote_malformed" in sign(one, vote(5, kind=canonical.PREVOTE, extension=b"x")).error.description
    with pytest.raises(Malformed, match="comet.signer_request"):
        one.answer(pv.Message())
    assert one.answer(pv.Message(pub_key_request=pv.PubKeyRequest(chain_id=CHAIN))).pub_key_response.pub_key.ed25519


steps = st.tuples(
    st.integers(1, 4), st.integers(0, 2), st.sampled_from([0, 1, 2]), st.sampled_from([b"a" * 32, b"b" * 32, b""])
)


@given(asked=st.lists(steps, max_size=30), restarts=st.sets(st.integers(0, 30)))
def test_whatever_is_asked_no_two_blocks_are_signed_at_one_step(tmp_path_factory, asked, restarts):
    """verifies that: over any order of requests and restarts there is one content a height, round and step."""
    path = tmp_path_factory.mktemp("signer") / "signed.json"
    key = Key()
    one = made(key, path)
    signed = {}
    for number, (height, round_, step, block) in enumerate(asked):
        if number in restarts:
            one = made(key, path)
        if step == 0:
            found = sign(one, proposal(height, round_, block=block or b"c" * 32))
        else:
            found = sign(one, vote(height, round_, kind=step, block=block))
        if not found.HasField("error"):
            assert signed.setdefault((height, round_, step), block) == block


async def test_the_protocol_over_a_real_socket(key, tmp_path):
    """verifies that: CometBFT listens, the signer dials, and dials again when it was hung up on."""
    heard = asyncio.Queue()

    async def node(reader, writer):
        writer.write(framed(pv.Message(ping_request=pv.PingRequest()).SerializeToString()))
        answer = pv.Message()
        answer.ParseFromString((await anext(messages(reader)))[0])
        heard.put_nowait(answer.WhichOneof("sum"))
        writer.write(b"\xff\xff\xff\xff\xff\xff")  # no length at all: the signer hangs up
        with contextlib.suppress(OSError):
            await reader.read()
        writer.close()

    socket = str(tmp_path / "signer.sock")
    troubles = []
    dialling = asyncio.ensure_future(signer.serve(made(key, tmp_path / "signed.json"), socket, troubles.append))
    await asyncio.sleep(0.1)
    server = await asyncio.start_unix_server(node, socket)
    try:
        for _ in range(2):
            assert await asyncio.wait_for(heard.get(), 10) == "ping_response"
    finally:
        dialling.cancel()
        server.close()
    assert troubles


def test_the_key_that_signs_is_the_one_in_force(key):
    """verifies that: after a rotation the next key signs, by itself; without any in force the first is shown."""
    following, wanted = Key(), [key.public_bytes()]
    ring = KeyRing([key, following], lambda: wanted[0])
    for one in (key, following):
        wanted[0] = one.public_bytes()
        assert ring.public_bytes() == one.public_bytes()
        one.key.public_key().verify(ring.sign(b"message"), b"message")
    wanted[0] = None
    assert ring.public_bytes() == key.public_bytes()


def test_the_key_may_be_in_a_token(tmp_path):
    """verifies that: votes signed inside SoftHSM (EDDSA) verify, and the protection is the same."""
    location = initialise_softhsm(tmp_path / "token", label="validator")
    with open_token(location) as token:
        public = token.generate_ed25519_key("validator")
        key = TokenKey(token, "validator")
        assert key.public_bytes() == public == token.ed25519_public("validator")
        one = made(key, tmp_path / "signed.json")
        signed = sign(one, vote(5)).vote
        block = canonical.block_id(b"a" * 32, 1, b"a" * 32)
        message = canonical.vote(2, height=5, round_=0, block=block, time_ns=100 * 10**9, chain_id=CHAIN)
        Ed25519PublicKey.from_public_bytes(public).verify(signed.signature, message)
        assert "comet.double_sign" in sign(made(key, tmp_path / "signed.json"), vote(5, block=b"")).error.description
