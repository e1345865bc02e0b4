"""Enrolment asks for the TPM maker's revocation lists: which, and where they come from, is configuration."""

import dataclasses
import time

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from software_tpm import public_area
from test_service import composed, configured, silicon, trust  # noqa: F401 - fixtures
from tpm_maker import TpmMaker, der

from moorline.cli import run as moor
from moorline.clock import Instant
from moorline.errors import Misconfigured, MoorlineError, NotAuthentic, Unavailable
from moorline.evidence import tpm_structures as tpm
from moorline.ledger.records import PlatformRecord
from moorline.rats import EvidenceRoot
from moorline.services import verifier_anchors, verifier_settings
from moorline.storage import verifier_chains
from moorline.storage.collateral_intake import Offered, Taken, take
from moorline.storage.collateral_store import open_collateral
from moorline.storage.verifier_rounds import EnrolledHost
from moorline.storage.verifier_store import VerifierStore
from moorline.verification.anchors import AnchorSet
from moorline.verification.collateral import ItemKind, ItemName
from moorline.verification.collateral_judging import Anchors, packed_crl
from moorline.verification.intel_pck import IntelAnchors
from moorline.verification.tpm_identity import endorsement_digest
from moorline.verification.tpm_revocation import item_subject
from moorline.wire import host as wire

NOW = Instant(int(time.time()))
ATTESTATION_KEY = tpm.RESTRICTED | tpm.SIGN | tpm.FIXED_TPM | tpm.FIXED_PARENT | tpm.SENSITIVE_DATA_ORIGIN


@pytest.fixture(scope="module")
def tpm_maker():
    return TpmMaker(NOW)


@pytest.fixture
def offline(configured, tpm_maker, world, tmp_path):  # noqa: F811 - fixtures
    """A verifier that trusts the maker of hardware TPMs, and has a store for its lists."""
    (tmp_path / "maker.der").write_bytes(der(tpm_maker.root))
    (tmp_path / "between.pem").write_bytes(tpm_maker.ca.public_bytes(Encoding.PEM))
    digest = endorsement_digest(tpm_maker.ek_key.public_key())
    world.register("h1", digest)
    world.platforms["h1"] = dataclasses.replace(world.platforms["h1"], simulated=False)
    assert isinstance(world.platforms["h1"], PlatformRecord)
    held(tmp_path, tpm_maker, "root", tpm_maker.crl("root"))
    return dataclasses.replace(
        configured,
        tpm_hardware_roots=(tmp_path / "maker.der",),
        tpm_intermediates=(tmp_path / "between.pem",),
        tpm_collateral=tmp_path / "collateral",
    )


def held(tmp_path, maker, issuer, crl, now=NOW):
    """What `moor collateral add` does."""
    certificate = getattr(maker, issuer)
    chain = certificate.public_bytes(Encoding.PEM).decode()
    name = ItemName(kind=ItemKind.TPM_CRL, subject=item_subject(certificate))
    offered = Offered(name=name, data=packed_crl(crl, chain), source="by hand", fetched=now)
    anchors = Anchors(snp=AnchorSet(snp=()), intel=IntelAnchors(anchors=()), tpm=maker.anchors)
    outcome = take(offered, open_collateral(tmp_path / "collateral", create=True), anchors=anchors, now=now)
    assert outcome.taken is not Taken.REFUSED, outcome.error


def request(maker):
    ak = public_area(maker.keys["die"].public_key(), attributes=ATTESTATION_KEY)
    return wire.EnrolRequest(ek_public=maker.public(), ek_certificates=maker.brought, ak_public=ak)


async def enrol(settings, world, maker):
    authority = composed(settings, world, verifier_anchors.read_anchors(settings, trust()))
    return await authority.begin_enrolment("h1", request(maker))


async def test_a_host_enrols_once_every_demanded_list_is_there(offline, world, tpm_maker, tmp_path):
    """verifies that: a missing list is said and not passed over, and one that comes in counts without a restart"""
    authority = composed(offline, world, verifier_anchors.read_anchors(offline, trust()))
    with pytest.raises(Unavailable) as undecided:
        await authority.begin_enrolment("h1", request(tpm_maker))
    assert undecided.value.code == "ek.crl_missing"
    held(tmp_path, tpm_maker, "ca", tpm_maker.crl("ca"))
    assert (await authority.begin_enrolment("h1", request(tpm_maker))).credential_blob


async def test_a_revoked_tpm_does_not_enrol(offline, world, tpm_maker, tmp_path):
    held(tmp_path, tpm_maker, "ca", tpm_maker.crl("ca", tpm_maker.die))
    with pytest.raises(NotAuthentic) as refused:
        await enrol(offline, world, tpm_maker)
    assert refused.value.code == "ek.revoked"


async def test_a_list_that_ended_in_the_store_is_stale_and_not_missing(offline, world, tpm_maker, tmp_path):
    held(tmp_path, tpm_maker, "ca", tpm_maker.crl("ca", start=-9, end=-8), now=Instant(NOW - 8 * 86400 - 60))
    with pytest.raises(NotAuthentic) as refused:
        await enrol(offline, world, tpm_maker)
    assert refused.value.code == "ek.crl_stale"


async def test_the_demand_is_waived_with_a_reason_and_never_in_production(offline, world, tpm_maker):
    waived = dataclasses.replace(offline, tpm_crls_not_required={"hardware": "the site has no network"})
    assert (await enrol(waived, world, tpm_maker)).credential_blob
    production = verifier_settings.production(waived)
    assert production.tpm_crls_not_required == {}
    with pytest.raises(MoorlineError) as refused:
        await enrol(dataclasses.replace(production, database=offline.database.with_name("p.db")), world, tpm_maker)
    assert refused.value.code == "ek.crl_missing"


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"tpm_crls_not_required": {"hardwear": "a typing error"}}, "verifier.unknown_root"),
        ({"tpm_crls_not_required": {"none": "no root at all"}}, "verifier.unknown_root"),
        ({"tpm_crls_not_required": {"hardware": " "}}, "verifier.no_reason"),
        ({"tpm_collateral": "nowhere"}, "collateral.no_store"),
    ],
)
def test_settings_that_would_pass_over_revocation_by_accident_are_refused_at_start(offline, world, tmp_path, changes, code):
    if "tpm_collateral" in changes:
        changes = {"tpm_collateral": tmp_path / "nowhere"}
    with pytest.raises(Misconfigured) as refused:
        verifier_anchors.revocation_reader(dataclasses.replace(offline, **changes))
    assert refused.value.code == code


def test_a_list_in_the_store_is_the_makers_own_bytes(offline, tpm_maker, tmp_path):
    reader = verifier_anchors.revocation_reader(offline)
    (crl,) = reader().crls
    assert x509.load_der_x509_crl(crl).issuer == tpm_maker.root.subject


def test_the_lists_about_the_tpms_of_a_verifier_are_asked_for(configured, world, tmp_path, capsys):  # noqa: F811 - fixtures
    """verifies that: `moor collateral fetch --enrolled` knows from a verifier's settings and database whom to ask; here all
    of it leads to a private address, which is refused."""
    vendor = TpmMaker(NOW, where="http://127.0.0.1")
    (tmp_path / "maker.der").write_bytes(der(vendor.root))
    (tmp_path / "between.der").write_bytes(der(vendor.ca))
    with (tmp_path / "verifier.toml").open("a") as file:
        file.write('\ntpm_hardware_roots = ["maker.der"]\ntpm_intermediates = ["between.der"]\n')
    store = VerifierStore.open(configured.database)
    host = EnrolledHost(host="h1", ek_digest=bytes(32), ak_public=b"", root=EvidenceRoot.HARDWARE, enrolled=NOW)
    store.enrol(host, chain=verifier_chains.packed(vendor.brought))
    store.close()
    words = ["collateral", "fetch", "--enrolled", tmp_path / "verifier.toml", "--store", tmp_path / "lists", "--pace", "0"]
    assert moor([str(word) for word in words]) == 1
    assert capsys.readouterr().out.count("endorser.private_address") == 2
