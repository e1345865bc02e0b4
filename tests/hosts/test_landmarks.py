"""Landmarks that a verifier knows refute the place in a host's tag, and the verdict says so."""

import dataclasses
import sys
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519

from moorline.errors import Misconfigured
from moorline.host_agent.echo import echo_key_digest
from moorline.policy import distance, reference_values
from moorline.rats import Outcome
from moorline.services import verifier
from moorline.services.attestation_authority import AttestationAuthority
from moorline.services.verifier_landmarks import MAX_AGE_S, Measurements, landmarks
from moorline.wire import keys

sys.path.insert(0, str(Path(__file__).parent))
from test_stories import Machine, result_of

pytestmark = pytest.mark.story
BERLIN, MS = "52.5200,13.4050~20km", 1_000_000


def pem(key):
    return key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)


class Around:
    """Landmarks in Tokyo and Paris, a folder of what they measured, a host that claims to stand in Berlin."""

    def __init__(self, world, simulated, directory):
        self.world, self.folder = world, directory / "measured"
        self.folder.mkdir()
        self.keys = {name: ec.generate_private_key(ec.SECP256R1()) for name in ("tokyo", "paris", "stranger")}
        self.echo = ed25519.Ed25519PrivateKey.generate()
        (self.folder / "h1.pem").write_bytes(pem(self.echo))
        places = {"tokyo": "35.6812,139.7671", "paris": "48.8566,2.3522"}
        for name in places:
            (directory / f"{name}.pem").write_bytes(pem(self.keys[name]))
        self.file = directory / "landmarks.toml"
        self.file.write_text(
            "".join(f'[landmark.{name}]\nplace = "{place}"\nkey = "{name}.pem"\n' for name, place in places.items())
        )
        self.measurements = Measurements(self.folder, landmarks(self.file), world.clock)
        parts = world.authority()._parts
        self.authority = AttestationAuthority(dataclasses.replace(parts, measured=self.measurements.judge))
        self.machine = Machine(world, simulated, "h1")
        self.machine.tag = world.tag("h1", self.machine.ek_digest, geographical=BERLIN)
        self.machine.tpm.write_location(reference_values.tag_digest(self.machine.tag))
        world.register("h1", self.machine.ek_digest, tag=self.machine.tag)

    def measured(self, landmark, took_ms, *, by=None, age_s=0, host="h1", echo=None):
        made = distance.Measurement(
            landmark=landmark,
            host=host,
            answering=echo_key_digest((echo or self.echo).public_key()),
            round_trip_ns=int(took_ms * MS),
            tries=20,
            at=self.world.clock.at - age_s,
        )
        signed = distance.sign(made, keys.KeySigner(self.keys[by or landmark]))
        (self.folder / f"h1.{landmark}.cose").write_bytes(signed)
        self.measurements.look()

    async def verdict(self):
        agent = self.machine.agent(self.authority)
        await agent.enrol()
        found = await agent.attest()
        about = [one for one in result_of(self.world, found).findings if one.code.startswith("host.location")]
        return found, {one.code: one.outcome for one in about}


@pytest.fixture
def around(world, running, tmp_path):
    return Around(world, running[0], tmp_path)


async def test_a_host_that_moved_with_its_tag_loses_its_verdict(around):
    """verifies that: a TPM that proves a tag of Berlin and answers Tokyo within 5 ms is not in Berlin; the finding says how
    far it can be; a landmark that it is compatible with helps nothing; before anybody measured it stood."""
    found, about = await around.verdict()
    assert found.status == "affirming"
    assert about == {
        "host.location_proven": Outcome.MET,
        "host.location_not_refuted": Outcome.NOT_APPRAISED,
    }
    around.measured("paris", 40)
    assert (await around.verdict())[0].status == "affirming"
    around.measured("tokyo", 5)
    found, about = await around.verdict()
    assert (found.status, found.code) == ("contraindicated", "host.location_refuted")
    assert "host.location_proven" not in about
    result = result_of(around.world, found)
    assert not any(one.capability.startswith("location.") for one in result.capabilities)
    (finding,) = [one for one in result.findings if one.code == "host.location_refuted"]
    assert finding.got.startswith("tokyo: at most 749 km, not ")


@pytest.mark.parametrize(
    "terms",
    [
        {"by": "stranger"},
        {"by": "paris"},
        {"age_s": MAX_AGE_S + 1},
        {"age_s": -60},
        {"host": "h2"},
        {"echo": ed25519.Ed25519PrivateKey.generate()},
    ],
)
async def test_what_does_not_hold_refutes_nobody(around, terms):
    """verifies that: a measurement by a stranger, in another's name, of yesterday or tomorrow, of another host or of
    another key, is as if there were none."""
    around.measured("tokyo", 5, **terms)
    found, about = await around.verdict()
    assert found.status == "affirming"
    assert about["host.location_not_refuted"] is Outcome.NOT_APPRAISED


async def test_a_refutation_ends_with_its_measurement(around):
    around.measured("tokyo", 5)
    assert (await around.verdict())[0].code == "host.location_refuted"
    around.world.clock.at += MAX_AGE_S - 3600
    assert around.measurements.judge("h1", distance.parse_place(BERLIN)).standing is distance.Standing.REFUTED
    around.world.clock.at += 3601
    assert around.measurements.judge("h1", distance.parse_place(BERLIN)).standing is distance.Standing.NOT_MEASURED


def test_landmarks_without_measurements_are_no_setting(around, tmp_path):
    from types import SimpleNamespace

    with pytest.raises(Misconfigured) as refused:
        verifier.measurements(SimpleNamespace(landmarks=around.file, measurements=None), around.world.clock)
    assert refused.value.code == "verifier.landmarks"
    assert verifier.measurements(SimpleNamespace(landmarks=None, measurements=None), around.world.clock) is None
    (tmp_path / "none.toml").write_text("[landmark]\n")
    with pytest.raises(Misconfigured) as refused:
        landmarks(tmp_path / "none.toml")
    assert refused.value.code == "distance.landmarks"
