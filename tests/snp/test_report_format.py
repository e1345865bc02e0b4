"""The report and the certificate table as formats: any bytes give a value or Malformed, and a value gives its bytes back."""

from __future__ import annotations

from uuid import UUID

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moorline.errors import Malformed, NotAuthentic
from moorline.evidence import snp
from moorline.evidence.snp import CertificateTable, Product, SigningKey, TcbVersion


@given(st.binary(max_size=2000) | st.binary(min_size=snp.REPORT_BYTES, max_size=snp.REPORT_BYTES))
def test_any_bytes_are_a_report_or_malformed(data):
    try:
        report = snp.parse_report(data)
    except Malformed:
        return
    assert snp.serialize_report(report) == data


@given(data=st.data())
@settings(max_examples=200)
def test_a_report_with_changed_bytes_parses_to_exactly_those_bytes(world, data):
    original = bytearray(snp.serialize_report(world.report(data.draw(st.sampled_from((2, 3, 5))))))
    for _ in range(data.draw(st.integers(1, 4))):
        original[data.draw(st.integers(0, snp.REPORT_BYTES - 1))] = data.draw(st.integers(0, 255))
    try:
        report = snp.parse_report(bytes(original))
    except Malformed:
        return
    assert snp.serialize_report(report) == bytes(original)


@given(position=st.integers(0, snp.REPORT_BYTES * 8 - 1), version=st.sampled_from((2, 3, 5)))
@settings(max_examples=150, deadline=None)
def test_no_flipped_bit_is_ever_accepted(world, position, version):
    spoiled = bytearray(snp.serialize_report(world.report(version)))
    spoiled[position // 8] ^= 1 << position % 8
    with pytest.raises((Malformed, NotAuthentic)):
        world.verify(snp.parse_report(bytes(spoiled)), report_data=bytes(spoiled[0x50:0x90]))


@pytest.mark.parametrize(
    ("offset", "value", "code"),
    [
        (0x00, 1, "snp.report_version"),
        (0x00, 4, "snp.report_version"),
        (0x00, 6, "snp.report_version"),
        (0x0A, 0x01, "snp.report_policy"),  # bit 17, reserved, must be one
        (0x0F, 0x80, "snp.report_reserved"),  # guest policy bit 63
        (0x40, 0x41, "snp.report_reserved"),  # platform info bit 6
        (0x48, 0x20, "snp.report_reserved"),  # signer info bit 5
        (0x48, 0x08, "snp.report_signing_key"),  # selector 2
        (0x4C, 1, "snp.report_reserved"),
        (0x18B, 1, "snp.report_reserved"),
        (0x1EB, 1, "snp.report_reserved"),
        (0x1EF, 1, "snp.report_reserved"),
        (0x1F8, 1, "snp.report_reserved"),  # a mitigation vector, which version 3 has not
        (0x29F, 1, "snp.report_reserved"),
        (0x330, 1, "snp.report_reserved"),
        (0x49F, 1, "snp.report_reserved"),
        (0x30, 4, "snp.report_vmpl"),
    ],
)
def test_each_reserved_place_is_looked_at(world, offset, value, code):
    data = bytearray(snp.serialize_report(world.report(3)))
    data[offset] = value
    with pytest.raises(Malformed) as refusal:
        snp.parse_report(bytes(data))
    assert refusal.value.code == code


def test_version_2_has_no_cpuid_and_version_5_has_vectors(world):
    data = bytearray(snp.serialize_report(world.report(2)))
    data[0x188] = 0x19
    with pytest.raises(Malformed):
        snp.parse_report(bytes(data))
    assert world.report(5, launch_mit_vector=11).launch_mit_vector == 11
    assert snp.parse_report(snp.serialize_report(world.report(5, current_mit_vector=3))).current_mit_vector == 3


@pytest.mark.parametrize("change", [-1, 1])
def test_one_byte_more_or_less_is_no_report(world, change):
    data = snp.serialize_report(world.report())
    with pytest.raises(Malformed) as refusal:
        snp.parse_report(data[:change] if change < 0 else data + b"\0")
    assert refusal.value.code == "snp.report_size"


@given(st.integers(0, 2**64 - 1), st.sampled_from(Product))
def test_a_tcb_number_is_its_components_or_malformed(raw, product):
    try:
        tcb = TcbVersion.parse(raw, product)
    except Malformed:
        reserved = slice(4, 7) if product is Product.TURIN else slice(2, 6)
        assert any(raw.to_bytes(8, "little")[reserved])
        return
    assert tcb.raw() == raw


def test_tcbs_compare_by_component_and_never_across_layouts():
    low = TcbVersion(boot_loader=3, tee=0, snp=8, microcode=115, fmc=None)
    newer = TcbVersion(boot_loader=4, tee=0, snp=8, microcode=115, fmc=None)
    mixed = TcbVersion(boot_loader=9, tee=0, snp=7, microcode=200, fmc=None)
    turin = TcbVersion(boot_loader=9, tee=9, snp=9, microcode=200, fmc=9)
    assert newer.at_least(low)
    assert not low.at_least(newer)
    assert not mixed.at_least(low), "a higher number somewhere does not make up for a lower one elsewhere"
    assert not turin.at_least(low)
    assert "microcode 115" in str(low)


def test_policy_bits_stand_where_the_abi_says():
    bits = {16: "smt", 18: "migrate_ma", 19: "debug", 20: "single_socket", 21: "cxl_allow", 22: "mem_aes_256_xts"}
    bits |= {23: "rapl_dis", 24: "ciphertext_hiding_dram", 25: "page_swap_disable"}
    for number, name in bits.items():
        policy = snp.GuestPolicy(raw=1 << number)
        assert [other for other in bits.values() if getattr(policy, other)] == [name]
    assert snp.GuestPolicy(raw=0x0137).abi == (1, 0x37)


def test_signer_info_is_read_by_its_bits(world):
    assert world.report(signer_info=0b1).author_key_en
    assert world.report(signer_info=0b10).mask_chip_key
    assert world.report(signer_info=1 << 2).signing_key is SigningKey.VLEK
    assert world.report(signer_info=7 << 2).signing_key is SigningKey.NONE


@given(st.binary(max_size=400))
def test_any_bytes_are_a_table_or_malformed(data):
    try:
        table = snp.parse_certificate_table(data)
    except Malformed:
        return
    assert snp.parse_certificate_table(snp.serialize_certificate_table(table)) == table


@given(st.lists(st.tuples(st.uuids().filter(lambda guid: guid.int), st.binary(min_size=1, max_size=50)), max_size=5))
def test_a_table_survives_the_trip(entries):
    table = CertificateTable(entries=tuple(dict(entries).items()))
    assert snp.parse_certificate_table(snp.serialize_certificate_table(table) + bytes(100)) == table


def _entry(guid: UUID, offset: int, length: int) -> bytes:
    return guid.bytes + offset.to_bytes(4, "little") + length.to_bytes(4, "little")


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (bytes(66_000), "snp.table_size"),
        (b"\1" * 24, "snp.table_unterminated"),
        (_entry(snp.VCEK_GUID, 0, 10) + bytes(24), "snp.table_range"),
        (_entry(snp.VCEK_GUID, 48, 100) + bytes(24 + 99), "snp.table_range"),
        (_entry(snp.VCEK_GUID, 48, 0) + bytes(48), "snp.table_range"),
        (_entry(snp.VCEK_GUID, 72, 9) + _entry(snp.ASK_GUID, 80, 9) + bytes(24 + 30), "snp.table_range"),
        (_entry(snp.VCEK_GUID, 72, 9) + _entry(snp.VCEK_GUID, 81, 9) + bytes(24 + 30), "snp.table_duplicate"),
    ],
)
def test_a_table_that_two_readers_could_read_differently_is_malformed(data, code):
    with pytest.raises(Malformed) as refusal:
        snp.parse_certificate_table(data)
    assert refusal.value.code == code


@pytest.mark.parametrize(
    ("family", "model", "product"),
    [
        (0x19, 0x01, Product.MILAN),
        (0x19, 0x11, Product.GENOA),
        (0x19, 0xA0, Product.GENOA),
        (0x1A, 0x02, Product.TURIN),
        (0x1A, 0x50, None),
        (0x17, 0x31, None),
    ],
)
def test_products_follow_from_family_and_model(family, model, product):
    assert snp.product_of_cpuid(family, model) is product
