"""Actors of these tests: a maker of simulated TPMs, TPMs it made, an authority over them.

All real, all under false roots.
"""

import secrets
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from moorline.attesters.tpm import Tpm
from moorline.clock import Instant
from moorline.errors import Refused
from moorline.ledger.records import PlatformRecord, Status
from moorline.policy import reference_values
from moorline.rats import EvidenceRoot
from moorline.services.attestation_authority import AttestationAuthority
from moorline.services.host_appraisal import Terms
from moorline.services.verifier_parts import Parts
from moorline.simulators import firmware
from moorline.simulators.tpm import SimulatedTpm, SimulatedTpmManufacturer
from moorline.storage.verifier_store import VerifierStore
from moorline.verification.tpm_identity import TpmAnchor
from moorline.verification.tpm_revocation import Revocation
from moorline.wire import keys

sys.path.insert(0, str(Path(__file__).parent))

NOW = Instant(1_790_000_000)
BOOT_PCRS = tuple(range(11))


@dataclass
class SetClock:
    at: int = 0

    def now(self):
        return Instant(self.at)


@pytest.fixture(scope="session")
def maker(tmp_path_factory):
    return SimulatedTpmManufacturer.create(tmp_path_factory.mktemp("maker"), now=Instant(int(time.time())))


@pytest.fixture(scope="session")
def tpms(maker, tmp_path_factory):
    """Two manufactured TPMs; each test that takes them boots them afresh."""
    base = tmp_path_factory.mktemp("t")
    return tuple(SimulatedTpm.manufacture(base / name, maker) for name in ("a", "b"))


@pytest.fixture
def running(tpms):
    """Both TPMs, just booted."""
    with tpms[0], tpms[1]:
        yield tpms


@dataclass
class World:
    """One provider's verifier over a directory; `restart` makes a new process's worth of it from the same state."""

    directory: object
    anchors: tuple
    clock: SetClock
    reference_key: ec.EllipticCurvePrivateKey = field(default_factory=lambda: ec.generate_private_key(ec.SECP256R1()))
    ear_key: ec.EllipticCurvePrivateKey = field(default_factory=lambda: ec.generate_private_key(ec.SECP256R1()))
    platforms: dict = field(default_factory=dict)
    profile: object = firmware.GOOD
    not_required: dict = field(default_factory=lambda: {"clock_safe": "swtpm is stopped by signal"})
    files: tuple = ()
    lease_s: int = 60
    revocation: Revocation = field(default_factory=lambda: Revocation(crls=(), not_required={EvidenceRoot.TEST: "swtpm"}))

    def register(self, host, ek_digest, *, location="EU/DE", tag=b""):
        self.platforms[host] = PlatformRecord(
            provider="alpha",
            id=host,
            status=Status.ACTIVE,
            chip_id=bytes(64),
            product="Milan",
            ek_digest=ek_digest,
            location=location,
            tag_digest=reference_values.tag_digest(tag),
            simulated=True,
        )

    def tag(self, host, ek_digest, *, location="EU/DE", **more):
        made = reference_values.LocationTag(
            host=host, ek_digest=ek_digest, location=location, not_after=self.clock.at + 86400, **more
        )
        return reference_values.sign_tag(made, keys.KeySigner(self.reference_key))

    def authority(self):
        async def platforms(hosts):
            missing = Refused("ledger.platform_not_active", "no such platform")
            return {host: self.platforms.get(host, missing) for host in hosts}

        async def sign(messages):
            return tuple(keys.KeySigner(self.ear_key).sign(message) for message in messages)

        values = firmware.reference_values(
            self.profile,
            name="good",
            not_before=Instant(self.clock.at - 1000),
            not_after=Instant(self.clock.at + 10**7),
            files=self.files,
        )
        return AttestationAuthority(
            Parts(
                verifier="spiffe://alpha.test/verifier/v1",
                audience="alpha.test",
                terms=Terms(lease_s=self.lease_s, challenge_s=30, pcrs=BOOT_PCRS, not_required=self.not_required),
                anchors=self.anchors,
                revocation=lambda: self.revocation,
                simulated_allowed=True,
                reference=reference_values.merge([values]),
                signers=(self.reference_key.public_key(),),
                platforms=platforms,
                sign=sign,
                store=VerifierStore.open(self.directory / "verifier.db"),
                clock=self.clock,
                random=secrets.token_bytes,
            )
        )


@pytest.fixture
def world(maker, tmp_path):
    anchor = TpmAnchor(certificate=maker.root_der, root=EvidenceRoot.TEST)
    return World(directory=tmp_path, anchors=(anchor,), clock=SetClock(int(time.time())))


def opened(simulated):
    return Tpm.open(simulated.tcti)
