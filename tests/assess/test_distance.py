"""Round trips refute a false place and prove none: pure geometry, signed measurements, and real datagrams with a delay.

verifies that: a host that answers faster than light could is refuted; a slow one never is; a measurement counts only from a
known landmark, about this host and key, and while it is fresh.
"""

import hashlib
import json
import select
import socket
import subprocess
import sys
import threading
import time

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from hypothesis import given
from hypothesis import strategies as st

from moorline.errors import Malformed, MoorlineError, NotAuthentic, Refused, Unavailable
from moorline.host_agent import echo
from moorline.policy import distance
from moorline.policy.distance import Landmark, Measurement, Place, Standing, at_least_m, judge, parse_place
from moorline.wire import keys

NOW = 1_795_000_000
BERLIN, FRANKFURT, TOKYO = "52.5200,13.4050", "50.1109,8.6821", "35.6762,139.6503"
PLACES = st.builds(Place, latitude=st.floats(-90, 90), longitude=st.floats(-180, 180), within_m=st.floats(0, 1e6))


def landmarks():
    signers = {name: keys.KeySigner(ec.generate_private_key(ec.SECP256R1())) for name in ("frankfurt", "tokyo")}
    places = {"frankfurt": FRANKFURT, "tokyo": TOKYO}
    known = {name: Landmark(place=parse_place(places[name]), key=one.public_key()) for name, one in signers.items()}
    return signers, known


def measured(landmark, milliseconds, **changes):
    made = {
        "landmark": landmark,
        "host": "h1",
        "answering": bytes(32),
        "round_trip_ns": int(milliseconds * 1e6),
        "tries": 20,
        "at": NOW,
    }
    return Measurement(**(made | changes))


def test_distances_are_below_the_great_circle_and_near_it():
    """Berlin to Frankfurt is 423 km, to Tokyo 8,920 km over the ground and 8,210 km straight through it."""
    near, far = (at_least_m(parse_place(BERLIN), parse_place(one)) for one in (FRANKFURT, TOKYO))
    assert 415_000 < near < 424_000
    assert 8_100_000 < far < 8_230_000


@given(PLACES, PLACES)
def test_a_distance_is_symmetric_and_within_the_earth(one, other):
    assert at_least_m(one, other) == pytest.approx(at_least_m(other, one), abs=1e-3)
    assert 0 <= at_least_m(one, other) <= 2 * distance.POLAR_RADIUS_M + 1


@given(PLACES, st.floats(0, 1e6))
def test_uncertainty_only_ever_helps_the_host(place, more):
    wider = Place(latitude=place.latitude, longitude=place.longitude, within_m=place.within_m + more)
    tokyo = parse_place(TOKYO)
    assert at_least_m(wider, tokyo) <= at_least_m(place, tokyo)


@given(PLACES, PLACES, st.floats(1.0, 10.0))
def test_an_honest_host_is_never_refuted(truth, landmark, slower):
    """Light from the true place takes at least the bound; any real answer takes that or longer, and passes."""
    point = Place(latitude=truth.latitude, longitude=truth.longitude, within_m=0)
    other = Place(latitude=landmark.latitude, longitude=landmark.longitude, within_m=0)
    fastest = at_least_m(point, other) * 2 / distance.LIGHT_M_PER_US * 1000
    made = measured("l", 1, round_trip_ns=int(fastest * slower) + 2)
    known = {"l": Landmark(place=other, key=ec.generate_private_key(ec.SECP256R1()).public_key())}
    assert judge(point, [made], known).standing is Standing.COMPATIBLE


def test_a_moved_host_that_keeps_its_tag_is_refuted():
    """The tag says Berlin; Tokyo hears the answer after 5 ms, in which light comes from no further than 750 km."""
    _, known = landmarks()
    found = judge(parse_place(BERLIN), [measured("frankfurt", 250), measured("tokyo", 5)], known)
    assert found.standing is Standing.REFUTED
    assert [bound.landmark for bound in found.bounds if bound.refutes] == ["tokyo"]


def test_the_same_host_in_its_place_is_compatible_and_no_more():
    _, known = landmarks()
    found = judge(parse_place(BERLIN), [measured("frankfurt", 9), measured("tokyo", 240)], known)
    assert found.standing is Standing.COMPATIBLE


def test_a_slow_answer_refutes_nothing_and_no_answer_says_nothing():
    _, known = landmarks()
    assert judge(parse_place(BERLIN), [measured("tokyo", 10_000)], known).standing is Standing.COMPATIBLE
    assert judge(parse_place(BERLIN), [], known).standing is Standing.NOT_MEASURED


def test_the_shortest_of_several_counts():
    _, known = landmarks()
    found = judge(parse_place(BERLIN), [measured("tokyo", 900), measured("tokyo", 5), measured("tokyo", 400)], known)
    assert found.standing is Standing.REFUTED


def test_what_is_a_place():
    assert parse_place("52.52,13.40~20km") == Place(latitude=52.52, longitude=13.40, within_m=20_000)
    assert parse_place("-33.9,+18.4").latitude == -33.9
    for text in ("", "Berlin", "91,0", "0,181", "1,2,3", "1e1,2", "52.5,13.4~x", "NaN,0", " 1,2", "1,2~9999999km", "٣,2"):
        with pytest.raises(Malformed):
            parse_place(text)


def test_a_measurement_counts_only_if_everything_about_it_does():
    signers, known = landmarks()

    def taken(made, signer="tokyo", by=known):
        data = distance.sign(made, signers[signer])
        return distance.parse_verified(data, by, host="h1", answering=bytes(32), now=NOW, max_age_s=60)

    assert taken(measured("tokyo", 5)).round_trip_ns == 5_000_000
    for made, signer, code in (
        (measured("frankfurt", 5), "tokyo", "distance.other_landmark"),
        (measured("tokyo", 5, host="h2"), "tokyo", "distance.other_host"),
        (measured("tokyo", 5, answering=b"\x01" * 32), "tokyo", "distance.other_host"),
        (measured("tokyo", 5, at=NOW - 61), "tokyo", "distance.stale"),
        (measured("tokyo", 5, at=NOW + 60), "tokyo", "distance.stale"),
        (measured("tokyo", 0), "tokyo", "distance.stale"),
    ):
        with pytest.raises(MoorlineError) as refused:
            taken(made, signer)
        assert refused.value.code == code
    with pytest.raises(NotAuthentic) as refused:
        taken(measured("tokyo", 5), by={"frankfurt": known["frankfurt"]})
    assert refused.value.code == "distance.landmark_unknown"
    data = bytearray(distance.sign(measured("tokyo", 5), signers["tokyo"]))
    data[-1] ^= 1
    with pytest.raises((NotAuthentic, Malformed, Refused)):
        distance.parse_verified(bytes(data), known, host="h1", answering=bytes(32), now=NOW, max_age_s=60)


# ------------------------------------------------------------- real datagrams


class Host:
    """A host that answers, in a thread of its own."""

    def __init__(self):
        self.key = ed25519.Ed25519PrivateKey.generate()
        self.socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.socket.bind(("127.0.0.1", 0))
        self.address = self.socket.getsockname()
        self.stopped = threading.Event()
        self.thread = threading.Thread(
            target=echo.answer, args=(self.socket, self.key), kwargs={"until": self.stopped.is_set}
        )
        self.thread.start()

    def stop(self):
        self.stopped.set()
        self.thread.join()
        self.socket.close()


class Delay:
    """A proxy that holds every datagram back for a while, both ways."""

    def __init__(self, to, seconds):
        self.front = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.back = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.front.bind(("127.0.0.1", 0))
        self.back.connect(to)
        self.address, self.seconds, self.stopped = self.front.getsockname(), seconds, threading.Event()
        self.thread = threading.Thread(target=self.run)
        self.thread.start()

    def run(self):
        peer = None
        while not self.stopped.is_set():
            for ready in select.select([self.front, self.back], [], [], 0.1)[0]:
                if ready is self.front:
                    data, peer = self.front.recvfrom(2000)
                    time.sleep(self.seconds / 2)
                    self.back.send(data)
                else:
                    data = self.back.recv(2000)
                    time.sleep(self.seconds / 2)
                    self.front.sendto(data, peer)

    def stop(self):
        self.stopped.set()
        self.thread.join()
        self.front.close()
        self.back.close()


@pytest.fixture
def host():
    made = Host()
    yield made
    made.stop()


def test_a_near_answer_refutes_a_far_place_and_a_delayed_one_does_not(host):
    """The host is on this machine, as the landmark is; its tag says it is on the other side of the earth."""
    _, known = landmarks()
    claimed = parse_place("-35.6762,-40.3497")  # opposite of Tokyo: light needs 85 ms there and back
    near = echo.round_trip_ns(host.address, host.key.public_key(), tries=5)
    delay = Delay(host.address, 0.1)
    try:
        far = echo.round_trip_ns(delay.address, host.key.public_key(), tries=2)
    finally:
        delay.stop()
    assert judge(claimed, [measured("tokyo", 1, round_trip_ns=near)], known).standing is Standing.REFUTED
    assert far >= 100_000_000
    assert judge(claimed, [measured("tokyo", 1, round_trip_ns=far)], known).standing is Standing.COMPATIBLE


def test_an_answer_by_another_key_is_none(host):
    with pytest.raises(Unavailable) as refused:
        echo.round_trip_ns(host.address, ed25519.Ed25519PrivateKey.generate().public_key(), tries=2, wait_s=0.1)
    assert refused.value.code == "distance.no_answer"


def test_an_answer_made_in_advance_is_none():
    """Whoever answers before it has the nonce cannot sign it: being early wins nothing."""
    key = ed25519.Ed25519PrivateKey.generate()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as liar:
        liar.bind(("127.0.0.1", 0))
        liar.settimeout(5)
        known_answer = []

        def lie():
            for _ in range(2):
                data, peer = liar.recvfrom(2000)
                known_answer.append(b"moor-echo!1" + key.sign(echo._CONTEXT + data[11:43]))
                liar.sendto(known_answer[0] if len(known_answer) > 1 else b"moor-echo!1" + bytes(64), peer)

        thread = threading.Thread(target=lie)
        thread.start()
        with pytest.raises(Unavailable):
            echo.round_trip_ns(liar.getsockname(), key.public_key(), tries=2, wait_s=0.2)
        thread.join()


def test_a_host_answers_questions_only_and_is_no_amplifier(host):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        asking.connect(host.address)
        asking.settimeout(0.2)
        for odd in (b"", b"hello", b"moor-echo?1" + bytes(32), b"moor-echo?1" + bytes(900)):
            asking.send(odd)
            with pytest.raises(TimeoutError):
                asking.recv(2000)
        asking.send(b"moor-echo?1".ljust(128, b"\0"))
        assert len(asking.recv(2000)) < 128


def pem(path, key):
    if hasattr(key, "private_bytes"):
        data = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    else:
        data = key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    path.write_bytes(data)
    return path


def test_by_hand_from_measuring_to_judging(host, tmp_path):
    key = ec.generate_private_key(ec.SECP256R1())
    private, public = pem(tmp_path / "tokyo.key", key), pem(tmp_path / "tokyo.pem", key.public_key())
    answering = pem(tmp_path / "echo.pem", host.key.public_key())
    landmarks = tmp_path / "landmarks.toml"
    landmarks.write_text(f'[landmark.tokyo]\nplace = "{TOKYO}"\nkey = "{public.name}"\n')

    def moor(*words):
        return subprocess.run(
            [sys.executable, "-m", "moorline.cli", "host", "locate", *map(str, words)],
            capture_output=True,
            text=True,
            check=False,
        )

    to = f"{host.address[0]}:{host.address[1]}"
    made = moor(
        "measure", to, "--host", "h1", "--echo-key", answering, "--landmark", "tokyo", "--key", private, "-o", tmp_path / "m"
    )
    assert made.returncode == 0, made.stderr
    words = ("--host", "h1", "--echo-key", answering, "--landmarks", landmarks)
    refuted = moor("judge", tmp_path / "m", "--place", BERLIN, *words)
    assert refuted.returncode == 1, refuted.stderr
    assert "refuted" in refuted.stdout
    there = moor("judge", tmp_path / "m", "--place", TOKYO, *words, "--json")
    assert there.returncode == 0
    assert json.loads(there.stdout)["standing"] == "compatible"
    assert moor("judge", tmp_path / "m", "--place", "Berlin", *words).returncode == 2
    landmarks.write_text("")
    assert "distance.landmarks" in moor("judge", tmp_path / "m", "--place", TOKYO, *words).stderr
    assert hashlib.sha256(keys.public_bytes(host.key.public_key())).digest() == echo.echo_key_digest(host.key.public_key())
