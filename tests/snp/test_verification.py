"""Each rule of verification.snp, with evidence that keeps all others: generated, truly signed, under a SIMULATED root."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, padding

from moorline.clock import to_datetime
from moorline.errors import Malformed, MoorlineError, NotAuthentic, Unavailable
from moorline.evidence import snp
from moorline.evidence.snp import CertificateTable, Product, SigningKey, TcbVersion
from moorline.rats import EvidenceRoot
from moorline.verification import snp as verification
from moorline.verification.anchors import AnchorSet, SnpAnchor, parse_anchor_file, production_anchors, serialize_anchor_file
from moorline.verification.snp import SnpEndorsements, endorsements_from_table, verify_snp_chain
from moorline.verification.verified import Verified

AMD = "1.3.6.1.4.1.3704.1"
DAY = 86_400


def refused(code: str, run, kind: type[MoorlineError] = NotAuthentic) -> MoorlineError:
    with pytest.raises(kind) as refusal:
        run()
    assert refusal.value.code == code
    return refusal.value


@pytest.mark.parametrize("version", [2, 3, 5])
def test_good_evidence_gives_claims(world, version):
    verified = world.verify(world.report(version))
    claims = verified.value
    assert verified.root is EvidenceRoot.TEST
    assert len(verified.collateral_digest) == 32
    assert (claims.measurement, claims.host_data, claims.report_data) == (
        world.measurement,
        world.host_data,
        world.report_data,
    )
    assert claims.chip_id == world.chip.chip_id
    assert claims.signer is SigningKey.VCEK
    assert claims.reported_tcb == claims.launch_tcb == world.chip.tcb
    assert not claims.revocation_checked


def test_turin_has_a_short_hwid_and_an_fmc(turin):
    claims = turin.verify().value
    assert claims.product is Product.TURIN
    assert claims.reported_tcb.fmc == turin.chip.tcb.fmc
    assert claims.chip_id[8:] == bytes(56)
    refused("snp.chip_mismatch", lambda: turin.verify(turin.report(chip_id=turin.chip.chip_id[:8] + b"\1" * 56)))


# ---------------------------------------------------------------- 1


def test_an_unknown_algorithm_is_refused(world):
    refused("snp.algorithm_unsupported", lambda: world.verify(world.report(signature_algo=0)))
    refused("snp.algorithm_unsupported", lambda: world.verify(world.report(signature_algo=2)))


def test_an_unsigned_report_is_refused(world):
    refused("snp.unsigned", lambda: world.verify(world.report(signer_info=0b10)))
    refused("snp.unsigned", lambda: world.verify(world.report(signer_info=7 << 2)))


# ---------------------------------------------------------------- 2


def test_a_stranger_with_the_same_names_is_not_an_anchor(world, stranger):
    """Verifies that: names open nothing; the stranger's ARK has the same subject and is another key."""
    refused("snp.anchor_unknown", lambda: stranger.verify(anchors=world.anchors))
    without_ca = replace(stranger.endorsements, intermediates=())
    refused("snp.chain_broken", lambda: world.verify(stranger.report(), without_ca))


def test_simulated_silicon_is_never_accepted_by_production_anchors(world):
    """Verifies that: shipped anchors refuse a simulated chip, with its CA and without."""
    refused("snp.anchor_unknown", lambda: world.verify(anchors=production_anchors()))
    refused(
        "snp.anchor_unknown",
        lambda: world.verify(endorsements=replace(world.endorsements, intermediates=()), anchors=production_anchors()),
    )


def test_no_anchors_match_nothing(world):
    refused("snp.anchor_unknown", lambda: world.verify(anchors=AnchorSet(snp=())))


def test_a_simulated_anchor_beside_vendor_ones_stays_a_test_root(world):
    both = production_anchors().plus(world.anchors)
    assert world.verify(anchors=both).root is EvidenceRoot.TEST


def test_an_anchor_counts_only_for_its_product(world):
    anchor = replace(world.anchors.snp[0], product=Product.GENOA)
    refused("snp.anchor_unknown", lambda: world.verify(anchors=AnchorSet(snp=(anchor,))))


def test_the_ca_may_come_from_the_anchors_file(world):
    assert world.verify(endorsements=replace(world.endorsements, intermediates=())).root is EvidenceRoot.TEST


def test_a_leaf_that_its_ca_did_not_sign_is_refused(world):
    leaf = bytearray(world.chip.vcek)
    leaf[-1] ^= 1
    refused("snp.chain_broken", lambda: world.verify(endorsements=replace(world.endorsements, leaf=bytes(leaf))))


def test_a_leaf_signed_with_another_scheme_is_refused(world):
    """Verifies that: PKCS#1 v1.5, another hash, another salt by the right key are still not what AMD signs with."""
    for scheme, algorithm in (
        (padding.PKCS1v15(), hashes.SHA384()),
        (padding.PSS(mgf=padding.MGF1(hashes.SHA256()), salt_length=32), hashes.SHA256()),
        (padding.PSS(mgf=padding.MGF1(hashes.SHA384()), salt_length=20), hashes.SHA384()),
    ):
        endorsements = world.leaf(rsa_padding=scheme, algorithm=algorithm)
        refused("snp.chain_broken", lambda e=endorsements: world.verify(endorsements=e))


def test_a_chip_certificate_cannot_be_a_ca(world):
    """Verifies that: a chip (whose key an attacker holds) cannot issue a chip: its certificate is no RSA CA."""
    fake = SnpEndorsements(leaf=world.chip.vcek, intermediates=(world.chip.vcek,), crl=None)
    assert world.verify(endorsements=fake).root is EvidenceRoot.TEST, "found through the anchors file instead"
    bare = AnchorSet(snp=(replace(world.anchors.snp[0], intermediates=()),))
    refused("snp.anchor_unknown", lambda: world.verify(endorsements=fake, anchors=bare))


def test_an_anchor_must_be_self_signed(world):
    crossed = SnpAnchor(product=Product.MILAN, ark=world.chip.ask, intermediates=(), root=EvidenceRoot.TEST)
    refused("snp.anchor_unknown", lambda: world.verify(anchors=AnchorSet(snp=(crossed,))))


def test_too_many_or_too_large_certificates_are_malformed(world):
    many = replace(world.endorsements, intermediates=(world.chip.ask,) * 5)
    refused("snp.chain_long", lambda: world.verify(endorsements=many), Malformed)
    large = replace(world.endorsements, leaf=bytes(9000))
    refused("snp.certificate_malformed", lambda: world.verify(endorsements=large), Malformed)
    refused("snp.certificate_malformed", lambda: world.verify(endorsements=replace(large, leaf=b"no")), Malformed)


# ---------------------------------------------------------------- 3 and 4


def test_a_leaf_with_another_curve_is_refused(world):
    key = ec.generate_private_key(ec.SECP256R1())
    refused("snp.leaf_key", lambda: world.verify(endorsements=world.leaf(key=key)))


@pytest.mark.parametrize("number", ["3.1", "3.2", "3.3", "3.8"])
def test_a_missing_tcb_component_refuses(world, number):
    endorsements = world.leaf(change=lambda extensions: extensions.pop(f"{AMD}.{number}"))
    refused("snp.tcb_missing", lambda: world.verify(endorsements=endorsements))


def test_a_turin_leaf_without_fmc_refuses(turin):
    endorsements = turin.leaf(change=lambda extensions: extensions.pop(f"{AMD}.3.9"))
    refused("snp.tcb_missing", lambda: turin.verify(endorsements=endorsements))


@pytest.mark.parametrize(
    ("number", "value", "code"),
    [
        ("3.1", b"\x02\x01\x80", "snp.certificate_malformed"),  # negative
        ("3.1", b"\x02\x02\x00\x04", "snp.certificate_malformed"),  # not the shortest form
        ("3.1", b"\x02\x02\x01\x04", "snp.certificate_malformed"),  # more than a byte
        ("3.1", b"\x04\x01\x04", "snp.certificate_malformed"),
        ("3.1", b"", "snp.certificate_malformed"),
        ("3.4", b"\x02\x01\x01", "snp.tcb_reserved"),
        ("3.9", b"\x02\x01\x00", "snp.tcb_reserved"),  # Milan has no FMC
        ("4", b"\1" * 63, "snp.certificate_malformed"),
        ("2", b"\x16\x09Milan", "snp.certificate_malformed"),
        ("2", b"\x0c\x05Milan", "snp.certificate_malformed"),
    ],
)
def test_an_extension_in_another_form_is_malformed(world, number, value, code):
    endorsements = world.leaf(change=lambda extensions: extensions.update({f"{AMD}.{number}": value}))
    refused(code, lambda: world.verify(endorsements=endorsements), Malformed)


def test_hwid_may_be_wrapped_in_an_octet_string(world):
    wrapped = b"\x04\x40" + world.chip.chip_id
    endorsements = world.leaf(change=lambda extensions: extensions.update({f"{AMD}.4": wrapped}))
    assert world.verify(endorsements=endorsements).value.chip_id == world.chip.chip_id


def test_a_missing_or_zero_hwid_refuses(world):
    refused("snp.hwid_missing", lambda: world.verify(endorsements=world.leaf(change=lambda e: e.pop(f"{AMD}.4"))))
    zero = world.leaf(change=lambda extensions: extensions.update({f"{AMD}.4": bytes(64)}))
    refused("snp.hwid_missing", lambda: world.verify(world.report(chip_id=bytes(64)), zero))


def test_an_unnamed_or_unknown_product_refuses(world):
    refused("snp.product_missing", lambda: world.verify(endorsements=world.leaf(change=lambda e: e.pop(f"{AMD}.2"))))
    naples = world.leaf(change=lambda extensions: extensions.update({f"{AMD}.2": b"\x16\x06Naples"}))
    refused("snp.product_unknown", lambda: world.verify(endorsements=naples))


def _as_vlek(extensions: dict[str, bytes]) -> None:
    extensions.pop(f"{AMD}.4")
    extensions[f"{AMD}.5"] = b"\x16\x0bexample.org"


def test_a_vlek_names_a_provider_and_no_chip(world):
    endorsements = world.leaf(change=_as_vlek, common_name="SEV-VLEK")
    claims = world.verify(world.report(signer_info=1 << 2), endorsements).value
    assert (claims.signer, claims.csp_id, claims.chip_id) == (SigningKey.VLEK, "example.org", None)


def test_signer_of_report_and_certificate_must_agree(world):
    vlek = world.leaf(change=_as_vlek, common_name="SEV-VLEK")
    refused("snp.signer_mismatch", lambda: world.verify(world.report(), vlek))
    refused("snp.signer_mismatch", lambda: world.verify(world.report(signer_info=1 << 2)))
    both = world.leaf(change=lambda extensions: extensions.update({f"{AMD}.5": b"\x16\x0bexample.org"}))
    refused("snp.signer_mismatch", lambda: world.verify(endorsements=both))
    refused("snp.signer_mismatch", lambda: world.verify(endorsements=world.leaf(common_name="SEV-VLEK")))


# ---------------------------------------------------------------- 5, 6


def test_a_report_signed_by_another_chip_is_refused(world):
    directory = world.maker.make_chip("other", now=world.now)
    refused(
        "snp.signature_invalid",
        lambda: world.verify(endorsements=replace(world.endorsements, leaf=(directory / "vcek.der").read_bytes())),
    )


@pytest.mark.parametrize("field", ["signature_r", "signature_s"])
@pytest.mark.parametrize("value", [0, 1, 2**384, 2**575])
def test_odd_signature_integers_are_refused(world, field, value):
    refused("snp.signature_invalid", lambda: world.verify(replace(world.report(), **{field: value})))


def test_validity_is_judged_at_every_call(world):
    """Verifies that: a chain that was good a moment ago is not good for ever, though it is remembered."""
    world.verify()
    refused("snp.certificate_expired", lambda: world.verify(now=world.now + 8 * 365 * DAY))
    refused("snp.certificate_not_yet_valid", lambda: world.verify(now=world.now - 2 * DAY))
    world.verify()


def test_the_edges_of_validity_belong_to_it(world):
    endorsements = world.leaf()
    for edge in (-1800, DAY):
        assert world.verify(endorsements=endorsements, now=world.now + edge).value.chip_id
    refused("snp.certificate_expired", lambda: world.verify(endorsements=endorsements, now=world.now + DAY + 1))
    refused("snp.certificate_not_yet_valid", lambda: world.verify(endorsements=endorsements, now=world.now - 1801))


# ---------------------------------------------------------------- 7


def _crl(
    world, key, *, revoked: tuple[int, ...] = (), start: int = -DAY, end: int = DAY, issuer: bytes | None = None
) -> bytes:
    name = x509.load_der_x509_certificate(issuer or world.chip.ark).subject
    now = to_datetime(world.now)
    builder = x509.CertificateRevocationListBuilder().issuer_name(name)
    builder = builder.last_update(now + timedelta(seconds=start)).next_update(now + timedelta(seconds=end))
    for serial in revoked:
        entry = x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(now).build()
        builder = builder.add_revoked_certificate(entry)
    pss = padding.PSS(mgf=padding.MGF1(hashes.SHA384()), salt_length=48)
    return builder.sign(key, hashes.SHA384(), rsa_padding=pss).public_bytes(serialization.Encoding.DER)


def test_a_current_crl_is_judged(world):
    with_crl = replace(world.endorsements, crl=_crl(world, world.maker.ark_key))
    verified = world.verify(endorsements=with_crl)
    assert verified.value.revocation_checked
    assert verified.collateral_digest != world.verify().collateral_digest
    for der in (world.chip.ask, world.chip.vcek):
        serial = x509.load_der_x509_certificate(der).serial_number
        bad = replace(with_crl, crl=_crl(world, world.maker.ark_key, revoked=(serial,)))
        refused("snp.revoked", lambda e=bad: world.verify(endorsements=e))


def test_a_crl_that_is_stale_forged_or_garbage_refuses(world, stranger):
    ark = world.maker.ark_key
    for code, crl, kind in (
        ("snp.crl_stale", _crl(world, ark, end=-1), NotAuthentic),
        ("snp.crl_not_yet_valid", _crl(world, ark, start=10), NotAuthentic),
        ("snp.crl_invalid", _crl(world, stranger.maker.ark_key), NotAuthentic),
        ("snp.crl_invalid", _crl(world, ark, issuer=world.chip.ask), NotAuthentic),
        ("snp.crl_malformed", b"\x30\x00", Malformed),
    ):
        refused(code, lambda c=crl: world.verify(endorsements=replace(world.endorsements, crl=c)), kind)
    chain = verify_snp_chain(replace(world.endorsements, crl=_crl(world, ark)), anchors=world.anchors, now=world.now)
    assert chain.leaf.hwid == world.chip.chip_id


# ---------------------------------------------------------------- 8 to 11


def test_product_of_report_and_certificate_must_agree(world):
    refused("snp.product_mismatch", lambda: world.verify(world.report(3, cpuid_mod_id=0x11)))
    refused("snp.product_mismatch", lambda: world.verify(world.report(3, cpuid_fam_id=0x17)))


def test_hwid_must_be_the_chip_id(world):
    refused("snp.chip_mismatch", lambda: world.verify(world.report(chip_id=b"\7" * 64)))


def test_a_masked_chip_id_names_no_chip(world):
    assert world.verify(world.report(chip_id=bytes(64))).value.chip_id is None


@pytest.mark.parametrize("part", ["boot_loader", "tee", "snp", "microcode"])
def test_the_certificate_must_be_of_the_reported_tcb(world, part):
    other = replace(world.chip.tcb, **{part: 9})
    refused("snp.tcb_mismatch", lambda: world.verify(world.report(reported_tcb=other.raw())))
    refused("snp.tcb_mismatch", lambda: world.verify(endorsements=world.leaf(tcb=other)))


def test_reserved_bytes_of_a_tcb_are_zero_in_the_layout_of_the_product(world):
    turin_layout = TcbVersion(boot_loader=1, tee=1, snp=1, microcode=1, fmc=1).raw()
    refused("snp.tcb_reserved", lambda: world.verify(world.report(launch_tcb=turin_layout)), Malformed)


def test_all_of_report_data_is_compared(world):
    for position in (0, 31, 32, 63):
        other = bytearray(world.report_data)
        other[position] ^= 1
        refused("snp.report_data_mismatch", lambda o=bytes(other): world.verify(report_data=o))


@pytest.mark.parametrize("size", [0, 32, 63, 65])
def test_expected_report_data_is_neither_padded_nor_cut(world, size):
    refused("snp.expected_report_data", lambda: world.verify(report_data=bytes(size)), Malformed)


# ---------------------------------------------------------------- what is remembered, anchors, the table, the type


def test_only_chains_that_hold_are_remembered(world, stranger):
    verification._judge_chain.cache_clear()
    for _ in range(3):
        refused("snp.anchor_unknown", lambda: stranger.verify(anchors=world.anchors))
    assert verification._judge_chain.cache_info().currsize == 0
    world.verify()
    world.verify()
    info = verification._judge_chain.cache_info()
    assert (info.currsize, info.hits) == (1, 1)
    assert info.maxsize is not None
    assert stranger.verify().root is EvidenceRoot.TEST
    refused("snp.anchor_unknown", lambda: stranger.verify(anchors=world.anchors))


def test_a_chain_is_remembered_for_its_anchors_only(world):
    world.verify()
    refused("snp.anchor_unknown", lambda: world.verify(anchors=production_anchors()))


def test_production_anchors_are_the_vendor_and_nothing_else():
    anchors = production_anchors()
    assert {anchor.product for anchor in anchors.snp} == set(Product)
    assert {anchor.root for anchor in anchors.snp} == {EvidenceRoot.HARDWARE}
    assert all(b"Advanced Micro Devices" in anchor.ark for anchor in anchors.snp)


def test_an_anchors_file_cannot_say_more_than_simulated(world):
    from moorline.wire import cbor

    data = world.maker.anchors_path.read_bytes()
    item = cbor.decode(data)
    refused("anchors.not_simulated", lambda: parse_anchor_file(cbor.encode({**item, "simulated": False})), Malformed)
    refused("anchors.version", lambda: parse_anchor_file(cbor.encode({**item, "version": 2})), Malformed)
    refused("message.fields", lambda: parse_anchor_file(cbor.encode({**item, "root": "hardware"})), Malformed)
    assert parse_anchor_file(serialize_anchor_file(())).snp == ()


def test_a_vendor_root_stays_a_vendor_root_beside_a_file_that_names_it():
    from moorline.verification.anchors import SimulatedAnchor

    vendor = production_anchors()
    claimed = SimulatedAnchor(product=Product.MILAN, ark=vendor.snp[0].ark, intermediates=())
    assert vendor.plus(parse_anchor_file(serialize_anchor_file((claimed,)))) == vendor


def test_endorsements_come_from_the_table(world):
    endorsements = endorsements_from_table(world.silicon().certificates())
    assert endorsements == world.endorsements
    refused("snp.leaf_missing", lambda: endorsements_from_table(b""), Unavailable)
    two = CertificateTable(entries=((snp.VCEK_GUID, b"a"), (snp.VLEK_GUID, b"b")))
    refused("snp.table_ambiguous", lambda: endorsements_from_table(snp.serialize_certificate_table(two)), Malformed)


def test_collateral_digest_names_the_certificates(world, stranger):
    assert world.verify().collateral_digest != stranger.verify().collateral_digest
    assert len(hashlib.sha256(world.verify().collateral_digest).digest()) == 32


def test_a_serial_number_of_zero_is_accepted_as_amd_issues_it(world):
    """Verifies that: the verifier takes a leaf with serial 0, without a warning reaching anybody."""
    der = world.leaf(serial=1).leaf
    tbs = x509.load_der_x509_certificate(der).tbs_certificate_bytes
    zero = tbs.replace(b"\xa0\x03\x02\x01\x02\x02\x01\x01", b"\xa0\x03\x02\x01\x02\x02\x01\x00", 1)
    assert zero != tbs
    pss = padding.PSS(mgf=padding.MGF1(hashes.SHA384()), salt_length=48)
    leaf = der.replace(tbs, zero)[:-512] + world.maker.ask_key.sign(zero, pss, hashes.SHA384())
    assert world.verify(endorsements=replace(world.endorsements, leaf=leaf)).value.chip_id == world.chip.chip_id


def test_verified_has_no_public_constructor(world):
    with pytest.raises(TypeError):
        Verified(world.report(), root=EvidenceRoot.HARDWARE, collateral_digest=b"")
    with pytest.raises(TypeError):
        Verified()


def test_only_verification_makes_verified_values():
    source = Path(verification.__file__).parents[1]
    makers = {path.relative_to(source).parts[0] for path in source.rglob("*.py") if "Verified._create(" in path.read_text()}
    assert makers == {"verification"}


def test_verified_shows_what_it_holds(world):
    assert "root=test" in repr(world.verify())
