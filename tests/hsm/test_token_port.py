"""One suite for every token: SoftHSM2 in this process, the same behind an owner's socket, and tpm2-pkcs11 on a swtpm.

What a token lacks is asked of the probe, and the suite then expects exactly that refusal: a token cannot pass by lacking.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import os
import secrets
import socket
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import Prehashed, encode_dss_signature

from moorline.errors import Malformed, Misconfigured, NotAuthentic, Refused, Unavailable
from moorline.hsm.keys import HSM_IDENTITY, ISSUING_CA, KEM, WRAPPING, point_key
from moorline.hsm.token import LocalToken, RemoteToken, initialise_softhsm, open_token
from moorline.hsm.token.calls import FRAME_CAP, Answer, Call
from moorline.hsm.token.capabilities import probe
from moorline.hsm.token.owner import Door, Owner, receive
from moorline.hsm.token.port import Token
from moorline.wire import schema
from moorline.wire.frames import frame

sys.path.insert(0, str(Path(__file__).parent))
import tpm_token

SIGNER = "hsm-identity"


@dataclass
class Bench:
    """A token to be tried: how it is used, and the local token behind it."""

    token: Token
    local: LocalToken

    def lacks(self, what: str) -> bool:
        return any(each.name == what for each in probe(self.local).lacking)


@pytest.fixture(scope="module", params=["softhsm", "owner", "tpm"])
def bench(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp(request.param)
    if request.param == "tpm":
        with tpm_token.running(directory) as location, open_token(location, lanes=2) as local:
            yield Bench(local, local)
        return
    location = initialise_softhsm(directory / "t", label="port")
    with open_token(location) as local:
        if request.param == "softhsm":
            yield Bench(local, local)
            return
        owner = Owner()
        door = Door(name="broker", path=directory / "own" / "token.sock", token=local, uids=frozenset({os.geteuid()}))
        owner.open(door)
        with RemoteToken(door.path) as remote:
            yield Bench(remote, local)
        owner.close()


def expecting(bench: Bench, what: str):
    """`pytest.raises` if the token lacks it, else nothing."""
    return pytest.raises(Unavailable) if bench.lacks(what) else contextlib.nullcontext()


def test_the_probe_leaves_nothing_behind(bench):
    """verifies that: asking what a token can do leaves no object in it, and none that a later look would show."""
    before = bench.token.inspect()
    for _ in range(2):
        probe(bench.local)
        assert bench.token.inspect() == before


def test_random_is_random(bench):
    """verifies that: the generator gives what is asked, and never the same."""
    found = {bench.token.random(32) for _ in range(20)}
    assert len(found) == 20
    assert {len(each) for each in found} == {32}


def test_a_key_signs_and_is_never_shown(bench):
    """verifies that: a signing key verifies outside, is sensitive and not extractable in the token's own words."""
    point = bench.local.generate_ec_key(SIGNER)
    assert bench.token.ec_point(SIGNER) == point
    digest = hashlib.sha256(b"message").digest()
    raw = bench.token.ecdsa(SIGNER, digest)
    der = encode_dss_signature(int.from_bytes(raw[:32], "big"), int.from_bytes(raw[32:], "big"))
    point_key(point).verify(der, digest, ec.ECDSA(Prehashed(hashes.SHA256())))
    (facts,) = [each for each in bench.token.inspect() if (each.label, each.kind) == (SIGNER, "private")]
    assert (facts.sensitive, facts.extractable, facts.never_extractable) == (True, False, True)
    with pytest.raises(Misconfigured) as caught:
        bench.local.generate_ec_key(SIGNER)
    assert caught.value.code == "token.key_exists"


def test_a_key_that_is_not_there_is_named(bench):
    """verifies that: an absent key is a missing key, never an empty answer."""
    with pytest.raises(Misconfigured) as caught:
        bench.token.ecdsa(ISSUING_CA, bytes(32))
    assert caught.value.code == "token.key_missing"
    assert not bench.local.has_key(ISSUING_CA)
    assert not bench.local.has_secret("launch-key-999")


def test_sealing(bench):
    """verifies that: what was sealed opens in its place only."""
    with expecting(bench, "seal"):
        bench.local.generate_wrapping_key(WRAPPING)
        sealed = bench.token.seal(WRAPPING, b"secret", b"place")
        assert bench.token.unseal(WRAPPING, sealed, b"place") == b"secret"
        for forged, place in ((sealed, b"elsewhere"), (sealed[:-1] + bytes([sealed[-1] ^ 1]), b"place")):
            with pytest.raises(NotAuthentic) as caught:
                bench.token.unseal(WRAPPING, forged, place)
            assert caught.value.code == "token.unseal"


def test_hmac(bench):
    """verifies that: an imported HMAC key gives the MAC everybody computes, and is destroyed when told."""
    key, label = secrets.token_bytes(32), "launch-key-7"
    with expecting(bench, "hmac"):
        bench.token.import_mac_key(label, key)
        assert bench.token.mac(label, b"m") == hmac.digest(key, b"m", "sha256")
        assert bench.token.has_secret(label)
        bench.token.destroy_secret(label)
        bench.token.destroy_secret(label)
        assert not bench.token.has_secret(label)
        with pytest.raises(Misconfigured):
            bench.token.mac(label, b"m")


def test_agreement_ends_in_a_key_nobody_sees(bench):
    """verifies that: ECDH in the token gives an HMAC key equal to the one of the other side, non-extractable."""
    mine, own = ec.generate_private_key(ec.SECP256R1()), "pair-ephemeral/beta/hsm-1/1"
    with expecting(bench, "agree"):
        theirs = point_key(bench.token.generate_ec_key(own, derive=True))
        point = tpm_token.point_of(mine)
        bench.token.agree(own, point, "pair/beta/hsm-1/1")
        shared = mine.exchange(ec.ECDH(), theirs)
        assert bench.token.mac("pair/beta/hsm-1/1", b"m") == hmac.digest(shared, b"m", "sha256")
        (facts,) = [each for each in bench.token.inspect() if each.label == "pair/beta/hsm-1/1"]
        assert (facts.sensitive, facts.extractable) == (True, False)
        bench.token.destroy_key(own)
        bench.token.destroy_key(own)
        assert not bench.token.has_key(own)
        bench.token.destroy_secret("pair/beta/hsm-1/1")


def test_counters_rise(bench):
    """verifies that: a counter starts at nothing, rises by one, and is never put back."""
    with expecting(bench, "counter"):
        assert bench.token.counter("port-counter") == 0
        assert [bench.token.advance("port-counter") for _ in range(3)] == [1, 2, 3]
        assert bench.local.set_counter("port-counter", 9) == 9
        with pytest.raises(Misconfigured) as caught:
            bench.local.set_counter("port-counter", 9)
        assert caught.value.code == "token.counter_back"
        assert bench.token.counter("port-counter") == 9


# -- the owner's socket alone --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def owned(tmp_path_factory):
    """A token with a provider's roles, its owner, and a client."""
    directory = tmp_path_factory.mktemp("owned")
    with open_token(initialise_softhsm(directory / "t", label="owned")) as local:
        for label in (HSM_IDENTITY, ISSUING_CA):
            local.generate_ec_key(label)
        local.generate_ec_key(KEM, derive=True)
        owner = Owner()
        owner.open(Door(name="broker", path=directory / "token.sock", token=local, uids=frozenset({os.geteuid()})))
        with RemoteToken(directory / "token.sock") as remote:
            yield owner, local, remote, directory
        owner.close()


def test_only_named_roles_are_offered(owned):
    """verifies that: no key is made, destroyed or used for something else through the door, and no label is invented."""
    _, local, remote, _ = owned
    local.generate_ec_key("not-a-role")
    for attempt in (
        lambda: remote.generate_ec_key(ISSUING_CA),
        lambda: remote.generate_wrapping_key(WRAPPING),
        lambda: remote.destroy_key(ISSUING_CA),
        lambda: remote.destroy_secret(WRAPPING),
        lambda: remote.ecdsa(KEM, bytes(32)),
        lambda: remote.mac(WRAPPING, b""),
        lambda: remote.ecdsa("not-a-role", bytes(32)),
        lambda: remote.agree(KEM, local.ec_point(KEM), "wrapping"),
        lambda: remote.advance("issuing-ca"),
        lambda: remote.generate_ec_key("issuing-ca@"),
        lambda: remote.generate_wrapping_key("issuing-ca@2"),
        lambda: remote.destroy_key("issuing-ca@2"),
    ):
        with pytest.raises(Refused) as caught:
            attempt()
        assert caught.value.code == "token.not_offered"
    with pytest.raises(Refused) as caught:
        remote.destroy_granted(ISSUING_CA, b"")
    assert caught.value.code == "token.not_granted"  # an owner that knows no custodians
    assert local.has_key(ISSUING_CA)


def test_every_label_of_a_broker_has_a_role():
    """verifies that: the labels under which the broker's rooms keep keys are offered by the door, and known to `inspect`."""
    from moorline.hsm import launch_keys, pair
    from moorline.hsm.exchange import Party
    from moorline.hsm.token.calls import BROKER_ROLES, require_allowed
    from moorline.hsm.token.inspection import role_of

    peer = Party(provider="beta", hsm="hsm-1")
    offered = {
        launch_keys._label(7): "import_mac_key",
        launch_keys.COUNTER: "advance",
        pair._label(peer, 3): "mac",
        pair._ephemeral(peer, 3): "generate_ec_key",
        HSM_IDENTITY: "ecdsa",
        f"{ISSUING_CA}@2": "ecdsa",
        KEM: "agree",
        f"{WRAPPING}@3": "seal",
    }
    for label, operation in offered.items():
        require_allowed(Call(operation=operation, label=label, into=pair._label(peer, 3)), BROKER_ROLES)
        assert role_of(label)


def test_other_users_are_shut_out(owned):
    """verifies that: the kernel's word on who connects counts; a door for another user answers nothing."""
    owner, local, _, directory = owned
    owner.open(Door(name="strange", path=directory / "strange.sock", token=local, uids=frozenset({os.geteuid() + 1})))
    with pytest.raises(Unavailable) as caught:
        RemoteToken(directory / "strange.sock").random(8)
    assert caught.value.code == "token.owner_gone"
    owner.shut("strange")
    assert not (directory / "strange.sock").exists()


@pytest.mark.parametrize(
    "sent",
    [
        b"\xff\xff\xff\xff",
        frame(b"not cbor"),
        frame(schema.encode(Answer())),
        frame(b""),
        b"\x00\x00\x00\x09abc",
    ],
)
def test_nonsense_ends_the_connection_and_nothing_else(owned, sent):
    """verifies that: a peer that does not speak the language is dropped without a word, and others are served."""
    _, _, remote, directory = owned
    with socket.socket(socket.AF_UNIX) as peer:
        peer.connect(str(directory / "token.sock"))
        peer.sendall(sent)
        peer.shutdown(socket.SHUT_WR)
        with contextlib.suppress(ConnectionResetError):
            assert peer.recv(10) == b""
    assert len(remote.random(8)) == 8


def test_too_much_randomness_is_refused(owned):
    """verifies that: a caller cannot have the owner fill its memory."""
    with pytest.raises(Malformed) as caught:
        owned[2].random(10**9)
    assert caught.value.code == "owner.call"
    assert FRAME_CAP < 10**6


def test_an_owner_that_comes_back_is_found_again(owned):
    """verifies that: a client survives its owner; a counter is not raised twice for one call whose answer was lost."""
    owner, local, remote, directory = owned
    before = remote.advance("story-counter")
    owner.shut("broker")
    with pytest.raises(Unavailable) as caught:
        remote.counter("story-counter")
    assert caught.value.code == "token.owner_gone"
    owner.open(Door(name="broker", path=directory / "token.sock", token=local, uids=frozenset({os.geteuid()})))
    assert remote.counter("story-counter") == before
    assert remote.advance("story-counter") == before + 1


def test_a_second_owner_is_refused(owned):
    """verifies that: two owners never share a socket, and two processes never share a SoftHSM directory."""
    import subprocess

    owner, local, _, directory = owned
    with pytest.raises(Misconfigured) as caught:
        Owner().open(Door(name="broker", path=directory / "token.sock", token=local, uids=frozenset({os.geteuid()})))
    assert caught.value.code == "owner.running"
    script = (
        "import sys; from pathlib import Path; from moorline.hsm.token import *; from moorline.errors import *\n"
        "try: open_token(TokenLocation(module=softhsm_module(), label='owned', pin_file=Path(sys.argv[1]),"
        " environment={'SOFTHSM2_CONF': sys.argv[2]}))\n"
        "except Misconfigured as error: print(error.code)\n"
    )
    where = local.location
    arguments = [str(where.pin_file), where.environment["SOFTHSM2_CONF"]]
    done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "token.owned"
    assert owner is not None


def test_a_call_is_what_the_page_says():
    """verifies that: calls and answers survive their encoding; a frame is a length and CBOR."""
    call = Call(operation="ecdsa", label=ISSUING_CA, data=bytes(32))
    assert schema.decode(Call, schema.encode(call)) == call
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.sendall(frame(schema.encode(call)))
        assert schema.decode(Call, receive(theirs) or b"") == call
        ours.shutdown(socket.SHUT_WR)
        assert receive(theirs) is None
