"""The launch digest of a virtual machine: known answers of another implementation, and firmware that cannot be trusted."""

import dataclasses
import json
import struct
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moorline.errors import Malformed, MoorlineError, Refused
from moorline.verification import snp_launch as launch

VECTORS = Path(__file__).parents[3] / "shared" / "vectors" / "snp" / "launch-digest-vectors"


def known_answers():
    if not VECTORS.is_dir():
        return [pytest.param(None, marks=pytest.mark.skip(reason="no shared vectors"))]
    return [pytest.param(one, id=one["name"]) for one in json.loads((VECTORS / "expected.json").read_text())]


@pytest.mark.parametrize("told", known_answers())
def test_known_launch_digests(told):
    firmware = launch.parse_firmware((VECTORS / Path(told["ovmf_file"].split('"')[1]).name).read_bytes())
    direct = None
    if told["kernel_file"] != "None":
        append = told["append"].partition('"')[2].partition('"')[0] if told["append"] != "None" else ""
        direct = launch.DirectBoot(kernel=b"", initrd=b"", command_line=append)

    def digest():
        return launch.guest_digest(
            firmware,
            direct,
            vcpus=int(told["vcpus"]),
            model=launch.CpuModel.EPYC_V4,
            sev_features=int(told["guest_features"].split("(")[1].rstrip(")"), 16),
            hypervisor=launch.Hypervisor.EC2 if "EC2" in told["vmm_type"] else launch.Hypervisor.QEMU,
            after_firmware=bytes.fromhex(told["ovmf_hash"]) if told["ovmf_hash"] else None,
        )

    if told["expected_launch_digest"] is None:
        with pytest.raises(Refused) as refused:
            digest()
        assert refused.value.code == "snp.kernel_not_measured"
    else:
        assert digest().hex() == told["expected_launch_digest"]


def image(*, sections=((0x800000, 0x2000, 1), (0x80A000, 0x1000, 2), (0x80B000, 0x1000, 3)), table=0, reset=True):
    """A firmware image of one page with the tables that this reader needs."""
    metadata = b"ASEV" + struct.pack("<III", 16 + 12 * len(sections), 1, len(sections))
    metadata += b"".join(struct.pack("<III", *one) for one in sections)
    entries = b""
    if table:
        entries += entry(launch._HASH_TABLE, struct.pack("<II", table, 0x400))
    if reset:
        entries += entry(launch._RESET_BLOCK, struct.pack("<I", 0x80B004))
    entries += entry(launch._METADATA, struct.pack("<I", launch.PAGE))
    footer = struct.pack("<H", len(entries) + 18) + launch._FOOTER.bytes_le
    return metadata.ljust(launch.PAGE - 32 - len(entries) - 18, b"\x00") + entries + footer + bytes(32)


def entry(guid, data):
    return data + struct.pack("<H", len(data) + 18) + guid.bytes_le


GOOD = {"vcpus": 2, "model": launch.CpuModel.EPYC_MILAN, "sev_features": 1, "hypervisor": launch.Hypervisor.QEMU}
HASHED = ((0x800000, 0x1000, 1), (0x80C000, 0x1000, 0x10))
DIRECT = launch.DirectBoot(kernel=b"kernel", initrd=b"initrd", command_line="quiet")


def test_every_input_of_a_launch_is_in_its_digest():
    """verifies that: no kernel, initrd, command line, firmware, CPU or feature can be exchanged under one digest"""
    firmware = launch.parse_firmware(image(sections=HASHED, table=0x80C400))
    other = launch.parse_firmware(image(sections=(*HASHED, (0x900000, 0x1000, 1)), table=0x80C400))
    moved = launch.parse_firmware(image(sections=HASHED, table=0x80C800))
    digests = [
        launch.guest_digest(firmware, DIRECT, **GOOD),
        launch.guest_digest(other, DIRECT, **GOOD),
        launch.guest_digest(moved, DIRECT, **GOOD),
        launch.guest_digest(firmware, None, **GOOD),
        *(launch.guest_digest(firmware, dataclasses.replace(DIRECT, **one), **GOOD) for one in CHANGES),
        *(launch.guest_digest(firmware, DIRECT, **{**GOOD, **one}) for one in LAUNCHES),
    ]
    assert len(set(digests)) == len(digests)
    assert launch.guest_digest(firmware, DIRECT, **GOOD) == digests[0]
    kept = launch.firmware_digest(firmware)
    assert launch.guest_digest(firmware, DIRECT, **GOOD, after_firmware=kept) == digests[0]


CHANGES = (
    {"kernel": b"other"},
    {"initrd": b""},
    {"command_line": "quiet debug"},
    {"kernel": b"initrd", "initrd": b"kernel"},
)
LAUNCHES = (
    {"vcpus": 1},
    {"vcpus": 3},
    {"model": launch.CpuModel.EPYC_GENOA},
    {"sev_features": 0x21},
    {"hypervisor": launch.Hypervisor.EC2},
)


def test_a_firmware_that_ignores_the_kernel_has_no_digest_with_one():
    for firmware in (image(), image(sections=HASHED), image(table=0x80C400)):
        with pytest.raises(Refused) as refused:
            launch.guest_digest(launch.parse_firmware(firmware), DIRECT, **GOOD)
        assert refused.value.code == "snp.kernel_not_measured"


@pytest.mark.parametrize(
    "bad",
    [
        b"",
        bytes(4096),
        image()[:-1],
        image(reset=False),
        image(sections=((0x800001, 0x1000, 1),)),
        image(sections=((0x800000, 0, 1),)),
        image(sections=((0x800000, 0xFFFFF000, 1),)),
        image().replace(b"ASEV", b"ASEX"),
    ],
    ids=["empty", "zeros", "cut", "no reset block", "unaligned", "empty section", "huge section", "signature"],
)
def test_a_firmware_image_that_cannot_be_read_is_malformed(bad):
    with pytest.raises(Malformed) as refused:
        launch.parse_firmware(bad)
    assert refused.value.code == "snp.firmware"


def test_a_section_of_an_unknown_kind_and_impossible_launches_are_malformed():
    firmware = launch.parse_firmware(image(sections=((0x800000, 0x1000, 9),)))
    with pytest.raises(Malformed):
        launch.guest_digest(firmware, None, **GOOD)
    for change in ({"vcpus": 0}, {"vcpus": 5000}, {"after_firmware": bytes(32)}):
        with pytest.raises(Malformed):
            launch.guest_digest(launch.parse_firmware(image()), None, **{**GOOD, **change})
    crowded = launch.parse_firmware(image(sections=HASHED, table=0x80CFF0))
    with pytest.raises(Malformed):
        launch.guest_digest(crowded, DIRECT, **GOOD)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200), st.integers(0, 4095))
def test_any_bytes_are_a_firmware_image_or_malformed(noise, at):
    good = image(sections=HASHED, table=0x80C400)
    for data in (noise, (noise * 21).ljust(4096, b"\x00")[:4096], (good[:at] + noise + good[at + len(noise) :])[:4096]):
        try:
            launch.guest_digest(launch.parse_firmware(data), None, **{**GOOD, "vcpus": 1})
        except MoorlineError as error:
            assert error.code == "snp.firmware"
