"""Boot logs and IMA lists: real ones replay to real PCRs, changed ones do not, and no description is believed."""

import hashlib
import json
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from moorline.errors import Malformed, MoorlineError, NotAuthentic
from moorline.evidence import eventlog as log
from moorline.evidence import ima as lists
from moorline.evidence.tpm_structures import ALG_SHA256
from moorline.simulators import firmware
from moorline.verification import ima
from moorline.verification.eventlog import Component, replay, verify_boot

SHARED = Path(__file__).parents[3] / "shared" / "vectors"
BANKS = {"sha1": 0x04, "sha256": 0x0B, "sha384": 0x0C, "sm3_256": 0x12}
CLASSES = {"eventlog.replay_mismatch": "replay"}
BOOT = tuple(range(10))


def cases(family):
    found = sorted(path.parent for path in SHARED.glob(f"{family}/*/case.json"))
    return found or [pytest.param(None, marks=pytest.mark.skip(reason="no shared vectors"))]


@pytest.mark.parametrize("case", cases("eventlog"), ids=lambda case: case and case.name)
def test_real_boot_logs_replay(case):
    told = json.loads((case / "case.json").read_text())
    data = (case / told["evidence"][0]["file"]).read_bytes()
    try:
        parsed = log.parse_event_log(data)
    except Malformed:
        assert told["expect"] == "malformed"
        return
    facts = told["facts"]
    assert len(parsed.events) == facts["events"]
    assert parsed.startup_locality == facts.get("startup_locality", 0)
    for bank, values in facts.get("pcrs", {}).items():
        replayed = replay(parsed, BANKS[bank])
        assert {index: replayed[int(index)].hex() for index in values} == values
    outcomes = set()
    for bank, values in told["inputs"].get("expected_pcrs", {}).items():
        quoted = {int(index): bytes.fromhex(value) for index, value in values.items()}
        try:
            state = verify_boot(parsed, bank=BANKS[bank], quoted=quoted, pcrs=sorted(quoted))
        except NotAuthentic as refused:
            outcomes.add(CLASSES[refused.code])
        else:
            if facts.get("secure_boot") is not None and bank == "sha256":
                assert state.secure_boot == facts["secure_boot"]
            assert state.anomalies == ()
            assert state.of(Component.KERNEL)
    assert outcomes == ({told["code_class"]} if told["expect"] == "refuse" else set())


IMA_CLASSES = {
    "ima.replay_mismatch": {"replay"},
    "ima.algorithm_unknown": {"unsupported"},
    "ima.template_hash": {"log", "signature"},
    "ima.line": {"structure"},
    "ima.truncated": {"structure"},
}


@pytest.mark.parametrize("case", cases("ima"), ids=lambda case: case and case.name)
def test_real_ima_lists_replay(case):
    told = json.loads((case / "case.json").read_text())
    if told["kind"] != "ima":
        pytest.skip("not a list to be run (CASES.md)")
    data = (case / "ima.log").read_bytes()
    quoted = told["inputs"].get("expected_pcrs", {}).get("sha1", {}).get("10") or told["facts"].get("pcr10_sha1")
    try:
        read = ima.verify_ima(ima.initial(0x04), data, bank=0x04, quoted=bytes.fromhex(quoted or "01" * 20))
    except MoorlineError as refused:
        assert told["expect"] != "accept", refused
        assert told["code_class"] is None or told["code_class"] in IMA_CLASSES[refused.code]
    else:
        # Lists refused by an allow-list, and not by their form, are authentic.
        assert told["expect"] == "accept" or told["code_class"] == "reference_value"
        assert len(read.entries) == told["facts"]["entries"]


def boot_of(events):
    quoted = {}
    for pcr in BOOT:
        value = bytes(32)
        for event in events:
            if event.pcr == pcr and event.kind != log.EV_NO_ACTION:
                value = hashlib.sha256(value + event.digests[ALG_SHA256]).digest()
        quoted[pcr] = value
    parsed = log.parse_event_log(firmware.serialize_log(tuple(events)))
    return verify_boot(parsed, bank=ALG_SHA256, quoted=quoted, pcrs=BOOT)


def test_a_simulated_boot_says_what_it_booted():
    state = boot_of(firmware.boot_events(firmware.GOOD))
    assert state.command_line == firmware.GOOD.command_line
    assert state.secure_boot is True
    assert state.anomalies == ()
    assert [one.digest for one in state.of(Component.KERNEL)] == [hashlib.sha256(firmware.GOOD.kernel).digest()]
    assert firmware.LABEL in log.parse_event_log(firmware.serialize_log(firmware.boot_events(firmware.GOOD))).events[
        0
    ].data.decode("utf-16-le")


@pytest.mark.parametrize(
    ("pcr", "kind", "data"),
    [
        (4, log.EV_SEPARATOR, bytes(4)),
        (9, log.EV_SEPARATOR, bytes(4)),
        (9, log.EV_IPL, b"/boot/grub/normal.mod\x00"),
        (4, log.EV_EFI_ACTION, b"Exit Boot Services Invocation"),
        (0, log.EV_POST_CODE, b"ACPI DATA"),
    ],
)
def test_a_measurement_cannot_hide_behind_its_type_or_description(pcr, kind, data):
    """verifies that: an event whose digest is another thing's is still there to be judged, whatever the log calls it"""
    hidden = log.Event(pcr, kind, {ALG_SHA256: hashlib.sha256(b"rootkit").digest()}, data)
    state = boot_of([*firmware.boot_events(firmware.GOOD), hidden])
    assert hashlib.sha256(b"rootkit").digest() in {one.digest for one in state.measured}


def test_a_payload_is_believed_only_where_its_digest_is_the_events():
    events = [
        log.Event(one.pcr, one.kind, one.digests, one.data.replace(b"lockdown=integrity", b"lockdown=none     "))
        for one in firmware.boot_events(firmware.GOOD)
    ]
    assert boot_of(events).command_line is None


def test_missing_and_repeated_separators_are_anomalies():
    events = [one for one in firmware.boot_events(firmware.GOOD) if (one.pcr, one.kind) != (4, log.EV_SEPARATOR)]
    assert boot_of(events).anomalies == ("PCR 4 has 0 separators",)


def test_unextended_events_are_not_replayed():
    good = firmware.boot_events(firmware.GOOD)
    noise = log.Event(4, log.EV_NO_ACTION, {ALG_SHA256: b"\x55" * 32}, b"noise")
    assert boot_of([*good, noise]).replayed == boot_of(good).replayed
    loud = log.Event(4, log.EV_EFI_ACTION, noise.digests, noise.data)
    parsed, quoted = log.parse_event_log(firmware.serialize_log([*good, loud])), boot_of(good).replayed
    with pytest.raises(NotAuthentic, match="eventlog.replay_mismatch"):
        verify_boot(parsed, bank=ALG_SHA256, quoted=quoted, pcrs=tuple(quoted))


GOOD_LOG = firmware.serialize_log(firmware.boot_events(firmware.GOOD))


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=400))
@example(b"")
@example(b"\xff" * 40)
def test_any_bytes_are_a_boot_log_or_malformed(data):
    for prefix in (b"", GOOD_LOG[:69], GOOD_LOG):
        try:
            log.parse_event_log(prefix + data)
        except Malformed:
            continue


def test_a_log_without_the_quoted_bank_proves_nothing():
    parsed = log.parse_event_log(GOOD_LOG)
    for bank in (0x0C, 0x12, 0xFF):
        with pytest.raises(Malformed, match="eventlog.bank_missing"):
            verify_boot(parsed, bank=bank, quoted={}, pcrs=())


def test_a_log_beyond_its_caps_or_cut_is_refused_by_its_own_rule():
    events = firmware.boot_events(firmware.GOOD)
    small = log.Event(0, log.EV_ACTION, {ALG_SHA256: bytes(32)}, b"")
    many = firmware.serialize_log([*events, *[small] * log.MAX_EVENTS])
    for data, code in (
        (GOOD_LOG + bytes(log.MAX_LOG), "eventlog.too_large"),
        (many, "eventlog.too_many_events"),
        (GOOD_LOG[:-1], "eventlog.truncated"),
    ):
        with pytest.raises(Malformed) as refused:
            log.parse_event_log(data)
        assert refused.value.code == code


@settings(max_examples=150, deadline=None)
@given(st.integers(0, len(GOOD_LOG) * 8 - 1))
def test_a_flipped_bit_never_replays_to_other_facts(bit):
    """verifies that: a changed log is refused, or the change touched only what nobody believes"""
    state = boot_of(firmware.boot_events(firmware.GOOD))
    changed = bytearray(GOOD_LOG)
    changed[bit // 8] ^= 1 << (bit % 8)
    try:
        parsed = log.parse_event_log(bytes(changed))
        found = verify_boot(parsed, bank=ALG_SHA256, quoted=state.replayed, pcrs=BOOT)
    except MoorlineError:
        return
    known = {one.digest for one in state.measured} | {hashlib.sha256(bytes(4)).digest()}
    known |= {hashlib.sha256(text).digest() for text in (b"Exit Boot Services Invocation",)}
    known |= {event.digests[ALG_SHA256] for event in firmware.boot_events(firmware.GOOD)}
    assert {one.digest for one in found.measured} <= known
    assert found.command_line in (state.command_line, None)
    assert found.secure_boot in (True, None)


def line_of(path, content, *, template="ima-ng", extra=b""):
    digest = hashlib.sha256(content).digest()
    entry = lists.ImaEntry(10, bytes(20), template, "sha256", digest, path, extra)
    shown = hashlib.sha1(entry.template_data()).hexdigest().encode()
    tail = b"" if template == "ima-ng" else b" " + extra.hex().encode()
    return b"10 %s %s sha256:%s %s%s\n" % (shown, template.encode(), digest.hex().encode(), path, tail)


def pcr10(data):
    value = bytes(32)
    for entry in lists.parse_ima(data):
        extension = b"\xff" * 32 if entry.violation else hashlib.sha256(entry.template_data()).digest()
        value = hashlib.sha256(value + extension).digest()
    return value


LIST = b"".join(
    [
        line_of(b"boot_aggregate", b"x"),
        line_of(b"/usr/bin/with space", b"y"),
        line_of(b"/usr/bin/\xff\xfe", b"z", template="ima-sig", extra=b"\x03\x02"),
        line_of(b"/usr/bin/unsigned", b"w", template="ima-sig"),
        b"10 " + b"0" * 40 + b" ima-ng sha256:" + b"0" * 64 + b" /var/log/open\n",
    ]
)


def test_an_ima_list_is_read_on_from_where_the_verifier_stopped():
    lines = LIST.splitlines(keepends=True)
    first = ima.verify_ima(ima.initial(ALG_SHA256), LIST, bank=ALG_SHA256, quoted=pcr10(b"".join(lines[:2])))
    assert (first.state.count, first.surplus) == (2, 3)
    rest = ima.verify_ima(first.state, b"".join(lines[2:]), bank=ALG_SHA256, quoted=pcr10(LIST))
    assert rest.state.count == 5
    assert [entry.path for entry in rest.entries][:2] == [b"/usr/bin/\xff\xfe", b"/usr/bin/unsigned"]
    assert rest.entries[-1].violation
    same = ima.verify_ima(rest.state, b"", bank=ALG_SHA256, quoted=pcr10(LIST))
    assert same.entries == ()
    for before, data, quoted in (
        (ima.initial(ALG_SHA256), b"".join(lines[2:]), pcr10(LIST)),  # from zero, in the middle of a boot
        (first.state, LIST, pcr10(LIST)),  # from the beginning, where two were read already
        (rest.state, b"", pcr10(b"".join(lines[:2]))),  # a quote of earlier: the list went back
        (first.state, b"".join(lines[2:4]), pcr10(LIST)),  # the quote is ahead of the list
    ):
        with pytest.raises(NotAuthentic, match="ima.replay_mismatch"):
            ima.verify_ima(before, data, bank=ALG_SHA256, quoted=quoted)


@pytest.mark.parametrize(
    "change",
    [
        lambda lines: lines[1:],
        lambda lines: [lines[1], lines[0], *lines[2:]],
        lambda lines: [*lines[:2], *lines[3:]],
        lambda lines: [*lines[:2], lines[2], *lines[2:]],
        lambda lines: [*lines[:1], line_of(b"/usr/bin/with space", b"evil"), *lines[2:]],
    ],
    ids=["cut", "reordered", "gap", "repeated", "replaced"],
)
def test_a_changed_ima_list_is_refused(change):
    lines = LIST.splitlines(keepends=True)
    with pytest.raises(NotAuthentic) as refused:
        ima.verify_ima(ima.initial(ALG_SHA256), b"".join(change(lines)), bank=ALG_SHA256, quoted=pcr10(LIST))
    assert refused.value.code == "ima.replay_mismatch"


def test_an_entry_for_another_pcr_is_refused():
    with pytest.raises(NotAuthentic) as refused:
        ima.verify_ima(ima.initial(ALG_SHA256), b"11" + LIST[2:], bank=ALG_SHA256, quoted=pcr10(LIST))
    assert refused.value.code == "ima.pcr"


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=300))
@example(b"10 " + b"0" * 40 + b" ima-ng sha256:" + b"a" * 64 + b" \n")
@example(b"10 " + b"0" * 40 + b" ima-ng sha256:" + b"a" * 64 + b" " + b"p" * 5000 + b"\n")
def test_any_bytes_are_an_ima_list_or_malformed(data):
    for text in (data, data + b"\n", LIST + data, LIST[:-1] + data):
        try:
            lists.parse_ima(text)
        except Malformed:
            continue


@settings(max_examples=150, deadline=None)
@given(st.integers(0, len(LIST) * 8 - 1))
def test_no_flipped_bit_of_an_ima_list_is_accepted_as_other_entries(bit):
    changed = bytearray(LIST)
    changed[bit // 8] ^= 1 << (bit % 8)
    try:
        read = ima.verify_ima(ima.initial(ALG_SHA256), bytes(changed), bank=ALG_SHA256, quoted=pcr10(LIST))
    except MoorlineError:
        return
    # Only the description of a violation is outside of what the template hash covers.
    good = lists.parse_ima(LIST)
    assert read.entries[:4] == good[:4]
    assert read.entries[4].violation
