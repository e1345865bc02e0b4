"""A small world of simulated silicon: two manufacturers that do not know each other, chips, and reports to spoil."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, padding
from cryptography.x509.oid import NameOID

from moorline.clock import Instant, to_datetime
from moorline.evidence.snp import Product, SnpReport, TcbVersion
from moorline.simulators.manufacturer import Chip, Manufacturer, create_manufacturer, open_chip, vcek_extensions
from moorline.simulators.silicon import GuestContext, Silicon, guest_policy
from moorline.verification.anchors import AnchorSet, parse_anchor_file
from moorline.verification.snp import SnpClaims, SnpEndorsements, verify_snp
from moorline.verification.verified import Verified

NOW = Instant(1_780_000_000)
REPORT_DATA = bytes(range(64))
HOST_DATA = b"\x5a" * 32
MEASUREMENT = b"\xa5" * 48
PSS = padding.PSS(mgf=padding.MGF1(hashes.SHA384()), salt_length=48)
SHARED = Path(__file__).parents[2].parent / "shared"


@dataclass(frozen=True)
class World:
    """Everything a test needs to make good evidence, and its bad twin."""

    maker: Manufacturer
    chip: Chip
    anchors: AnchorSet
    now: Instant = NOW
    report_data: bytes = REPORT_DATA
    host_data: bytes = HOST_DATA
    measurement: bytes = MEASUREMENT

    def silicon(self, version: int = 3) -> Silicon:
        return Silicon(self.chip, report_version=version)

    def guest(self, *, debug: bool = False) -> GuestContext:
        policy = guest_policy(debug=debug)
        return GuestContext(measurement=self.measurement, host_data=self.host_data, policy=policy, report_id=b"\x11" * 32)

    def report(self, version: int = 3, **changes: object) -> SnpReport:
        """A report with some fields changed before it was signed."""
        silicon = self.silicon(version)
        return silicon.signed(replace(silicon.unsigned_report(self.guest(), self.report_data), **changes))

    @property
    def endorsements(self) -> SnpEndorsements:
        return SnpEndorsements(leaf=self.chip.vcek, intermediates=(self.chip.ask,), crl=None)

    def verify(
        self, report: SnpReport | None = None, endorsements: SnpEndorsements | None = None, **arguments: object
    ) -> Verified[SnpClaims]:
        given = {"report_data": self.report_data, "anchors": self.anchors, "now": self.now, **arguments}
        return verify_snp(report or self.report(), endorsements or self.endorsements, **given)

    def leaf(
        self,
        *,
        change: Callable[[dict[str, bytes]], None] = lambda _: None,
        tcb: TcbVersion | None = None,
        common_name: str = "SEV-VCEK",
        key: ec.EllipticCurvePrivateKey | None = None,
        rsa_padding: padding.AsymmetricPadding = PSS,
        algorithm: hashes.HashAlgorithm | None = None,
        serial: int = 7,
    ) -> SnpEndorsements:
        """Endorsements with a leaf made to order, truly signed by the ASK of this world."""
        extensions = dict(vcek_extensions(self.chip.product, self.chip.chip_id, tcb or self.chip.tcb))
        change(extensions)
        builder = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)]))
            .issuer_name(x509.load_der_x509_certificate(self.chip.ask).subject)
            .serial_number(serial)
            .not_valid_before(to_datetime(self.now) - timedelta(minutes=30))
            .not_valid_after(to_datetime(self.now) + timedelta(days=1))
            .public_key((key or self.chip.key).public_key())
        )
        for oid, value in extensions.items():
            builder = builder.add_extension(x509.UnrecognizedExtension(x509.ObjectIdentifier(oid), value), critical=False)
        made = builder.sign(self.maker.ask_key, algorithm or hashes.SHA384(), rsa_padding=rsa_padding)
        leaf = made.public_bytes(serialization.Encoding.DER)
        return SnpEndorsements(leaf=leaf, intermediates=(self.chip.ask,), crl=None)


def make_world(directory: Path, product: Product = Product.MILAN) -> World:
    maker = create_manufacturer(directory, now=NOW, product=product)
    anchors = parse_anchor_file(maker.anchors_path.read_bytes())
    return World(maker=maker, chip=open_chip(maker.make_chip("chip", now=NOW)), anchors=anchors)


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="session")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Another simulated manufacturer: same names, same product, other keys."""
    return make_world(tmp_path_factory.mktemp("stranger"))


@pytest.fixture(scope="session")
def turin(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("turin"), Product.TURIN)


@pytest.fixture(scope="session")
def vectors() -> Path:
    directory = SHARED / "vectors" / "snp"
    if not directory.is_dir():
        pytest.skip("shared vectors are not on this machine")
    return directory
