"""What a boot log says about Secure Boot: read from real boots, proven by digests, and not to be talked over later."""

import dataclasses
import hashlib
from pathlib import Path

import pytest
from cryptography import x509
from hypothesis import given, settings
from hypothesis import strategies as st

from moorline.errors import Malformed, Unavailable
from moorline.evidence import eventlog as log
from moorline.evidence import uefi_variables as uefi
from moorline.evidence.tpm_structures import ALG_SHA256, ALG_SM3_256
from moorline.verification import eventlog
from moorline.verification.eventlog import Component, replay, verify_boot

SHARED = Path(__file__).parents[3] / "shared" / "vectors"
ON = uefi.Variable(uefi.GLOBAL_VARIABLE, "SecureBoot", b"\x01")
OFF = uefi.Variable(uefi.GLOBAL_VARIABLE, "SecureBoot", b"\x00")


def real(path):
    if not (SHARED / path).is_file():
        pytest.skip("no shared vectors")
    parsed = log.parse_event_log((SHARED / path).read_bytes())
    quoted = replay(parsed, ALG_SHA256)
    return verify_boot(parsed, bank=ALG_SHA256, quoted=quoted, pcrs=sorted(quoted))


def test_our_own_signed_kernel_image_was_accepted_under_db():
    state = real("own/uki-sb-on/eventlog.bin")
    assert state.secure_boot is True
    assert set(state.keys.databases) == {"PK", "KEK", "db", "dbx"}
    assert len(state.keys.databases["db"]) == 1
    assert [one.kind for one in state.keys.databases["dbx"]] == [uefi.CERT_SHA256]
    (authority,) = state.keys.authorities
    assert authority.database == "db"
    assert authority.certificate() == state.keys.databases["db"][0].data
    assert "SnakeOil" in x509.load_der_x509_certificate(authority.certificate()).subject.rfc4514_string()
    assert state.of(Component.KERNEL)
    off = real("own/sb-off/eventlog.bin")
    assert off.secure_boot is not True
    assert off.keys.authorities == ()


def test_a_boot_through_shim_tells_its_authorities_and_lists():
    state = real("eventlog/gce-rhel8-uefi/eventlog.bin")
    assert state.secure_boot is True
    assert [one.database for one in state.keys.authorities] == ["db", "Shim"]
    names = [x509.load_der_x509_certificate(one.certificate()).subject.rfc4514_string() for one in state.keys.authorities]
    assert "Microsoft" in names[0]
    assert "Red Hat" in names[1]
    assert set(state.keys.mok) == {"MokList", "MokListX"}
    assert len(state.keys.databases["dbx"]) > 50
    assert state.command_line is not None


def event(pcr, kind, data, digest=None):
    return log.Event(pcr, kind, {ALG_SHA256: digest or hashlib.sha256(data).digest()}, data)


def state_of(*events):
    parsed = log.EventLog(crypto_agile=True, banks=(ALG_SHA256,), events=events)
    quoted = replay(parsed, ALG_SHA256)
    return verify_boot(parsed, bank=ALG_SHA256, quoted=quoted, pcrs=sorted(quoted))


def config(variable, pcr=7):
    return event(pcr, log.EV_EFI_VARIABLE_DRIVER_CONFIG, uefi.serialize_variable(variable))


SEPARATOR = event(7, log.EV_SEPARATOR, bytes(4))


def test_secure_boot_is_what_the_firmware_measured_first():
    assert state_of(config(ON), SEPARATOR).secure_boot is True
    assert state_of(config(OFF), SEPARATOR).secure_boot is False
    assert state_of(SEPARATOR).secure_boot is None


@pytest.mark.parametrize(
    "events",
    [
        (config(OFF), SEPARATOR, config(ON)),
        (config(OFF), config(ON), SEPARATOR),
        (config(ON, pcr=23), config(OFF), SEPARATOR),
        (SEPARATOR, config(ON)),
        (event(7, log.EV_EFI_VARIABLE_DRIVER_CONFIG, uefi.serialize_variable(ON), bytes(32)), SEPARATOR),
        (config(dataclasses.replace(ON, vendor=uefi.SHIM_LOCK)), SEPARATOR),
        (config(dataclasses.replace(ON, value=b"")), SEPARATOR),
        (config(dataclasses.replace(ON, value=b"\x01\x01")), SEPARATOR),
    ],
    ids=["later", "second", "other PCR", "after separator", "other digest", "other vendor", "empty", "long"],
)
def test_nothing_else_turns_secure_boot_on(events):
    """verifies that: software that runs after the firmware cannot extend its way into Secure Boot being on"""
    assert state_of(*events).secure_boot is not True


def test_keys_that_cannot_be_read_are_unknown_and_not_empty():
    broken = uefi.Variable(uefi.IMAGE_SECURITY_DATABASE, "dbx", b"\x01\x02")
    empty = uefi.Variable(uefi.IMAGE_SECURITY_DATABASE, "db", b"")
    other = uefi.Variable(uefi.GLOBAL_VARIABLE, "db", b"")
    assert state_of(config(broken), config(empty)).keys.databases == {"db": ()}
    assert state_of(config(other)).keys.databases == {}
    unproven = event(7, log.EV_EFI_VARIABLE_AUTHORITY, uefi.serialize_variable(broken), bytes(32))
    assert state_of(unproven).keys.authorities == ()


UUIDS = st.uuids(allow_nil=True)


@settings(max_examples=200, deadline=None)
@given(UUIDS, st.text(st.characters(max_codepoint=0xD7FF), max_size=20), st.binary(max_size=60), st.binary(max_size=60))
def test_variables_are_written_back_to_the_same_bytes(vendor, name, value, noise):
    variable = uefi.Variable(vendor, name, value)
    assert uefi.parse_variable(uefi.serialize_variable(variable)) == variable
    for data in (noise, uefi.serialize_variable(variable) + noise):
        try:
            assert uefi.serialize_variable(uefi.parse_variable(data)) == data
        except Malformed:
            continue


@settings(max_examples=200, deadline=None)
@given(st.data(), st.binary(max_size=100))
def test_signature_lists_are_written_back_to_the_same_bytes(data, noise):
    made = []
    for _ in range(data.draw(st.integers(0, 3))):
        size, kind = data.draw(st.integers(16, 60)), data.draw(UUIDS)
        bodies = data.draw(st.lists(st.binary(min_size=size, max_size=size), min_size=1, max_size=3))
        signatures = tuple(uefi.parse_signature(one, kind) for one in bodies)
        made.append(uefi.SignatureList(kind, data.draw(st.binary(max_size=5)), size, signatures))
    encoded = uefi.serialize_signature_lists(tuple(made))
    assert uefi.parse_signature_lists(encoded) == tuple(made)
    for text in (noise, encoded + noise, encoded[:-1]):
        try:
            assert uefi.serialize_signature_lists(uefi.parse_signature_lists(text)) == text
        except Malformed:
            continue


def test_a_log_in_a_hash_that_is_missing_here_is_told_and_not_crashed_over(monkeypatch):
    parsed = log.EventLog(
        crypto_agile=True, banks=(ALG_SM3_256,), events=(log.Event(0, log.EV_ACTION, {ALG_SM3_256: bytes(32)}, b""),)
    )
    assert len(replay(parsed, ALG_SM3_256)[0]) == 32

    def missing():
        raise eventlog.UnsupportedAlgorithm("SM3")

    monkeypatch.setattr(eventlog.hashes, "SM3", missing)
    with pytest.raises(Unavailable) as told:
        replay(parsed, ALG_SM3_256)
    assert told.value.code == "eventlog.hash_unsupported"
