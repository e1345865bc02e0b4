"""The event log of a confidential guest against the RTMRs of its quote."""

import hashlib
import json
import struct
from pathlib import Path

import pytest

from moorline.errors import Malformed, NotAuthentic
from moorline.evidence.ccel import parse_ccel_table
from moorline.evidence.eventlog import EV_EFI_ACTION, EV_NO_ACTION, parse_event_log
from moorline.verification.ccel import replay_ccel, verify_ccel

LOGS = Path(__file__).parents[2].parent / "shared" / "vectors" / "eventlog"


def log(*events, bank=0x0C):
    """A crypto-agile log with one bank; events are (index, kind, payload)."""
    size = {0x0C: 48, 0x0B: 32}[bank]
    spec = b"Spec ID Event03\x00" + struct.pack("<I4BI", 0, 0, 2, 0, 2, 1) + struct.pack("<HH", bank, size) + b"\x00"
    out = struct.pack("<II20sI", 1, EV_NO_ACTION, bytes(20), len(spec)) + spec
    for index, kind, payload in events:
        digest = hashlib.new("sha384" if bank == 0x0C else "sha256", payload).digest()
        out += struct.pack("<IIIH", index, kind, 1, bank) + digest + struct.pack("<I", len(payload)) + payload
    return parse_event_log(out)


def extended(*payloads):
    value = bytes(48)
    for payload in payloads:
        value = hashlib.sha384(value + hashlib.sha384(payload).digest()).digest()
    return value


def test_a_log_replays_to_its_registers():
    """verifies that: index 1 to 4 are RTMR 0 to 3, a comment extends nothing, an unused register is zero"""
    parsed = log((1, EV_EFI_ACTION, b"a"), (2, EV_EFI_ACTION, b"b"), (1, EV_EFI_ACTION, b"c"), (0, EV_NO_ACTION, b"d"))
    rtmrs = (extended(b"a", b"c"), extended(b"b"), bytes(48), bytes(48))
    assert replay_ccel(parsed) == rtmrs
    verify_ccel(parsed, rtmrs, registers=(0, 1, 2, 3))


def test_a_register_that_differs_refuses():
    """verifies that: a changed register refuses, named or only in the log; one nobody names may be the guest's own"""
    parsed = log((1, EV_EFI_ACTION, b"a"))
    good = (extended(b"a"), bytes(48), bytes(48), b"\x01" * 48)
    verify_ccel(parsed, good, registers=(1, 2))
    for rtmrs, registers in (((bytes(48), *good[1:]), ()), (good, (3,))):
        with pytest.raises(NotAuthentic, match="ccel.replay_mismatch"):
            verify_ccel(parsed, rtmrs, registers=registers)


@pytest.mark.parametrize("index", [0, 5, 17])
def test_only_rtmrs_are_extended(index):
    """verifies that: an event on MRTD or on a register that does not exist refuses"""
    with pytest.raises(NotAuthentic, match="ccel.register"):
        replay_ccel(log((index, EV_EFI_ACTION, b"a")))


def test_another_bank_cannot_stand_in():
    """verifies that: a log without SHA-384 cannot be replayed"""
    with pytest.raises(Malformed, match="eventlog.bank_missing"):
        replay_ccel(log((1, EV_EFI_ACTION, b"a"), bank=0x0B))


def test_the_table_is_exact():
    """verifies that: length, checksum and reserved bytes of the ACPI table are judged"""
    body = struct.pack(
        "<4sIBB6s8sI4sIBBHQQ", b"CCEL", 56, 1, 0, b"MOOR  ", b"TEST    ", 1, b"MOOR", 1, 2, 0, 0, 4096, 1 << 20
    )
    good = body[:9] + bytes([-sum(body) % 256]) + body[10:]
    assert parse_ccel_table(good).log_length == 4096
    for bad in (body, good[:-1], good + b"\x00", b"XCEL" + good[4:]):
        with pytest.raises(Malformed, match="ccel.table"):
            parse_ccel_table(bad)


def test_real_logs_replay_as_their_cases_say():
    """verifies that: the CCEL logs of the vectors that TDX guests made replay to the values their cases state"""
    if not LOGS.is_dir():
        pytest.skip("../shared/vectors is not here")
    seen = 0
    for path in sorted(LOGS.glob("ccel-*/case.json")):
        case = json.loads(path.read_text())
        facts = case["facts"].get("pcrs", {}).get("sha384")
        if facts is None:
            continue
        replayed = replay_ccel(parse_event_log((path.parent / case["evidence"][0]["file"]).read_bytes()))
        assert {index: replayed[int(index) - 1].hex() for index in facts} == facts
        seen += 1
    assert seen
