"""The policy for hosts and its results: absence refuses, every rule leaves a finding, a token is exactly what was signed."""

import base64
import dataclasses
import hashlib
import json

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given, settings
from hypothesis import strategies as st
from software_tpm import SoftwareTpm

from moorline.clock import Instant
from moorline.errors import Malformed, MoorlineError, NotAuthentic, Refused
from moorline.evidence.eventlog import parse_event_log
from moorline.evidence.ima import parse_ima
from moorline.evidence.tpm_structures import ALG_SHA256
from moorline.policy import ear, host, reference_values
from moorline.policy.match import NotRequired, OneOf
from moorline.rats import AR4SI_CLAIMS, Assurance, EvidenceRoot, Outcome, Tier
from moorline.simulators import firmware
from moorline.verification.eventlog import Component, verify_boot
from moorline.verification.tpm_quote import attestation_key, verify_quote
from moorline.wire import keys

NOW = Instant(1_790_000_000)
BOOT = tuple(range(10))
NONCE = bytes(range(32))
KEY = ec.generate_private_key(ec.SECP256R1())
SIGNER = keys.KeySigner(KEY)
VALUES = firmware.reference_values(firmware.GOOD, name="good", not_before=NOW, not_after=Instant(NOW + 1000))
REFERENCE = reference_values.merge([VALUES])
APPRAISAL = host.Appraisal(
    verifier="spiffe://alpha.test/verifier/v1",
    issued=NOW,
    expires=Instant(NOW + 60),
    nonce=NONCE,
    simulated_allowed=True,
)


def facts(profile=firmware.GOOD, root=EvidenceRoot.TEST):
    events = firmware.boot_events(profile)
    pcrs = {pcr: firmware._replayed(events, pcr) for pcr in BOOT}
    tpm = SoftwareTpm()
    quote = verify_quote(
        *tpm.quote(NONCE, pcrs),
        pcrs,
        key=attestation_key(tpm.public, root),
        qualifying=NONCE,
        bank=ALG_SHA256,
        selection=BOOT,
    )
    tag = reference_values.LocationTag(host="h1", ek_digest=bytes(32), location="EU/DE", not_after=NOW + 1)
    return host.HostFacts(
        host="h1",
        ek_digest=bytes(32),
        chip_id=b"c",
        quote=quote,
        boot=verify_boot(parse_event_log(firmware.serialize_log(events)), bank=ALG_SHA256, quoted=pcrs, pcrs=BOOT),
        boot_digest=bytes(32),
        files=host.FileStanding(entries=3, unlisted=0, violations=0, first_unlisted=()),
        location=host.ProvenLocation(tag=tag, digest=b"d", registered_digest=b"d", registered_location="EU/DE"),
    )


def appraise(seen=None, policy=None, **changes):
    chosen = policy or host.strict_policy(REFERENCE, not_required={})
    return host.appraise_host(
        dataclasses.replace(seen or facts(), **changes), chosen, reference=REFERENCE, appraisal=APPRAISAL
    )


LEFT_OUT = {
    **{name: f"host.{name}_not_measured" for name in ("firmware", "configuration", "bootloader", "kernel", "initrd")},
    "command_line": "host.command_line_not_measured",
    "other": "host.boot_event_not_in_reference_values",
    "secure_boot": "host.secure_boot_off",
    "boot_anomalies": "host.boot_log_anomaly",
    "unlisted_files": "host.file_not_in_reference_values",
    "ima_violations": "host.ima_violation",
    "clock_safe": "host.clock_unsafe",
    "location": "host.location_not_registered",
}
FIELDS = [field.name for field in dataclasses.fields(host.HostPolicy)]


def test_a_host_that_meets_everything_is_affirmed():
    result = appraise()
    assert result.status is Tier.AFFIRMING
    assert result.vector["executables"] is Tier.AFFIRMING
    assert result.vector["storage-opaque"] is Tier.NONE


@pytest.mark.parametrize("field", FIELDS)
def test_a_field_left_out_of_the_policy_refuses(field):
    policy = dataclasses.replace(host.strict_policy(REFERENCE, not_required={}), **{field: None})
    result = appraise(policy=policy)
    assert result.status is Tier.CONTRAINDICATED
    (refused,) = [finding for finding in result.findings if finding.outcome is Outcome.NOT_MET]
    assert refused.code == LEFT_OUT[field]


@pytest.mark.parametrize("field", FIELDS)
def test_what_is_not_required_is_said_and_affirms_nothing(field):
    result = appraise(policy=host.strict_policy(REFERENCE, not_required={field: "because of the test"}))
    assert result.status is Tier.AFFIRMING
    silent = [one for one in result.findings if one.outcome is Outcome.NOT_APPRAISED]
    assert [one.says for one in silent] == ["not required: because of the test"]


@pytest.mark.parametrize("component", list(Component))
def test_an_empty_list_accepts_nothing(component):
    empty = {component.value: OneOf(frozenset())}
    result = appraise(policy=dataclasses.replace(host.strict_policy(REFERENCE, not_required={}), **empty))
    measured = facts().boot.of(component)
    assert (result.status is Tier.CONTRAINDICATED) == bool(measured)


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"boot": None}, "host.firmware_not_measured"),
        ({"files": None}, "host.ima_missing"),
        ({"files": host.NO_FILES}, "host.ima_missing"),
        (
            {"files": host.FileStanding(entries=1, unlisted=1, violations=0, first_unlisted=())},
            "host.file_not_in_reference_values",
        ),
        ({"files": host.FileStanding(entries=1, unlisted=0, violations=1, first_unlisted=())}, "host.ima_violation"),
        ({"location": None}, "host.location_missing"),
        ({"host": "h2"}, "host.location_other_host"),
        ({"ek_digest": bytes(31) + b"\x01"}, "host.location_other_host"),
        ({"location": dataclasses.replace(facts().location, registered_digest=b"e")}, "host.location_not_registered"),
        ({"location": dataclasses.replace(facts().location, registered_location="US")}, "host.location_not_registered"),
    ],
)
def test_missing_and_wrong_evidence_refuses_by_its_own_rule(changes, code):
    result = appraise(**changes)
    assert result.status is Tier.CONTRAINDICATED
    assert result.first_refusal().code == code


@pytest.mark.parametrize("part", ["firmware", "bootloader", "kernel", "initrd"])
def test_each_changed_part_of_a_boot_has_its_own_code(part):
    changed = dataclasses.replace(firmware.GOOD, **{part: b"something else"})
    result = appraise(facts(changed))
    assert result.first_refusal().code == f"host.{part}_not_in_reference_values"


def test_secure_boot_off_and_another_command_line():
    off = appraise(facts(dataclasses.replace(firmware.GOOD, secure_boot=False)))
    codes = {one.code for one in off.findings if one.outcome is Outcome.NOT_MET}
    assert codes == {"host.configuration_not_in_reference_values", "host.secure_boot_off"}
    other = appraise(facts(dataclasses.replace(firmware.GOOD, command_line="/vmlinuz-6.1.0-40 init=/bin/sh")))
    assert other.first_refusal().code == "host.command_line_not_in_reference_values"
    assert "kernel.lockdown" not in {one.capability for one in other.capabilities}


@pytest.mark.parametrize(
    ("root", "allowed", "level"),
    [
        (EvidenceRoot.TEST, True, Assurance.MEASURED),
        (EvidenceRoot.TEST, False, Assurance.DECLARED),
        (EvidenceRoot.VIRTUAL, False, Assurance.ASSERTED),
        (EvidenceRoot.HARDWARE, False, Assurance.MEASURED),
    ],
)
def test_the_root_caps_every_capability(root, allowed, level):
    result = host.appraise_host(
        facts(root=root),
        host.strict_policy(REFERENCE, not_required={}),
        reference=REFERENCE,
        appraisal=dataclasses.replace(APPRAISAL, simulated_allowed=allowed),
    )
    levels = {one.capability: one.level for one in result.capabilities}
    assert levels["boot.measured"] is level
    assert ("root.tpm20.hardware" in levels) == (root is not EvidenceRoot.VIRTUAL)


def test_files_are_judged_by_path_and_digest_and_the_aggregate_by_the_boot():
    aggregate = hashlib.sha256(b"pcrs").digest()
    path, content = firmware.GOOD.files[0]

    def entry(name, digest, shown="1" * 40):
        return parse_ima(f"10 {shown} ima-ng sha256:{digest} {name}\n".encode())[0]

    good = hashlib.sha256(content).hexdigest()
    entries = [
        entry("boot_aggregate", aggregate.hex()),
        entry(path, good),
        entry("/elsewhere", good),
        entry(path, "2" * 64),
        entry("boot_aggregate", "3" * 64),
        entry(path, good, "0" * 40),
    ]
    standing = host.appraise_files(host.NO_FILES, entries, reference=REFERENCE, aggregate=aggregate)
    assert (standing.entries, standing.unlisted, standing.violations) == (6, 3, 1)
    assert [one.path for one in standing.first_unlisted] == ["/elsewhere", path, "boot_aggregate"]
    judged = appraise(files=dataclasses.replace(standing, violations=0))
    assert judged.first_refusal().code == "host.file_not_in_reference_values"
    first = host.appraise_files(host.NO_FILES, entries[4:5], reference=REFERENCE, aggregate=aggregate)
    assert appraise(files=first).first_refusal().code == "host.file_not_in_reference_values"
    many = host.appraise_files(standing, [entries[2]] * 100, reference=REFERENCE, aggregate=aggregate)
    assert (many.unlisted, len(many.first_unlisted)) == (103, host.UNLISTED_KEPT)


def test_reference_values_are_signed_dated_and_for_one_purpose():
    signed = reference_values.sign(VALUES, SIGNER)
    assert reference_values.parse_verified(signed, [KEY.public_key()], now=NOW) == VALUES
    stranger = ec.generate_private_key(ec.SECP256R1()).public_key()
    for signers, now, code in (
        ([], NOW, "reference.signer_unknown"),
        ([stranger], NOW, "reference.signer_unknown"),
        ([KEY.public_key()], Instant(NOW - 1), "reference.not_valid_now"),
        ([KEY.public_key()], Instant(NOW + 1001), "reference.not_valid_now"),
    ):
        with pytest.raises(MoorlineError) as refused:
            reference_values.parse_verified(signed, signers, now=now)
        assert refused.value.code == code
    tag = reference_values.sign_tag(
        reference_values.LocationTag(host="h", ek_digest=bytes(32), location="EU", not_after=1), SIGNER
    )
    with pytest.raises(Malformed) as malformed:
        reference_values.parse_verified(tag, [KEY.public_key()], now=NOW)
    assert malformed.value.code == "cose.purpose"
    with pytest.raises(Refused) as refused:
        reference_values.merge([])
    assert refused.value.code == "reference.none"


# Tokens ----------------------------------------------------------------------------------------------------------------

RESULT = appraise()
TOKEN = ear.encode(RESULT, SIGNER, audience="alpha.test")


def parse(token, *, now=NOW, audience="alpha.test", key=None):
    return ear.parse_verified(token, key or KEY.public_key(), now=now, audience=audience)


def test_a_token_gives_back_the_whole_result():
    assert parse(TOKEN) == RESULT
    bad = appraise(boot=None)
    assert parse(ear.encode(bad, SIGNER, audience="alpha.test")) == bad
    claims = json.loads(base64.urlsafe_b64decode(TOKEN.split(".")[1] + "=="))
    assert claims["eat_profile"] == "tag:ietf.org,2026:rats/ear#04"
    appraisal = claims["submods"]["host/h1"]
    assert appraisal["ear_status"] == "affirming"
    assert set(appraisal["ear_trustworthiness_vector"]) <= set(AR4SI_CLAIMS)


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        ({"now": Instant(NOW + 60)}, "ear.expired"),
        ({"now": Instant(NOW - ear.SKEW_S - 1)}, "ear.not_yet_valid"),
        ({"audience": "beta.test"}, "ear.audience"),
        ({"key": ec.generate_private_key(ec.SECP256R1()).public_key()}, "signature.invalid"),
        ({"key": ec.generate_private_key(ec.SECP384R1()).public_key()}, "ear.algorithm"),
    ],
)
def test_a_token_at_the_wrong_time_place_or_key_is_refused(arguments, code):
    with pytest.raises(MoorlineError) as refused:
        parse(TOKEN, **arguments)
    assert refused.value.code == code


def resigned(change):
    head, body, _ = TOKEN.split(".")
    claims = change(json.loads(base64.urlsafe_b64decode(body + "==")))
    text = claims if isinstance(claims, bytes) else json.dumps(claims).encode()
    message = head.encode() + b"." + base64.urlsafe_b64encode(text).rstrip(b"=")
    return ear.assemble(message, SIGNER.sign(message))


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (lambda claims: claims | {"eat_profile": "tag:github.com,2023:veraison/ear"}, "ear.profile"),
        (lambda claims: claims | {"extra": 1}, "ear.claim"),
        (lambda claims: {name: claims[name] for name in claims if name != "exp"}, "ear.claim"),
        (lambda claims: claims | {"exp": "later"}, "ear.claim"),
        (lambda claims: claims | {"submods": {}}, "ear.claim"),
        (lambda claims: claims | {"submods": claims["submods"] | {"host/h2": claims["submods"]["host/h1"]}}, "ear.claim"),
        (lambda claims: [], "ear.claim"),
        (lambda claims: b"[" * 50000, "ear.not_json"),
        (lambda claims: json.dumps(claims).encode()[:-1] + b',"exp":99999999999}', "ear.not_json"),
        (
            lambda claims: {**claims, "submods": {"host/h1": claims["submods"]["host/h1"] | {"ear_status": "warning"}}},
            "ear.inconsistent",
        ),
    ],
)
def test_even_our_own_signature_does_not_excuse_a_wrong_shape(change, code):
    with pytest.raises(Malformed) as refused:
        parse(resigned(change))
    assert refused.value.code == code


@pytest.mark.parametrize("header", [b'{"alg":"none"}', b'{"alg":"HS256","typ":"JWT"}', b'{"typ":"JWT","alg":"ES256"}'])
def test_a_header_of_anybodys_choice_is_refused(header):
    _, body, signature = TOKEN.split(".")
    chosen = base64.urlsafe_b64encode(header).rstrip(b"=").decode()
    for token in (f"{chosen}.{body}.{signature}", f"{chosen}.{body}."):
        with pytest.raises(NotAuthentic) as refused:
            parse(token)
        assert refused.value.code == "ear.algorithm"


@settings(max_examples=200, deadline=None)
@given(st.integers(0, len(TOKEN) - 1), st.characters(codec="ascii"))
def test_no_changed_character_is_accepted(at, letter):
    changed = TOKEN[:at] + letter + TOKEN[at + 1 :]
    if changed != TOKEN:
        with pytest.raises(MoorlineError):
            parse(changed)


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=200))
def test_any_text_is_refused_with_a_typed_error(text):
    for token in (text, f"{ear.HEADER.decode()}.{text}.{text}"):
        with pytest.raises(MoorlineError):
            parse(token)


def test_not_required_needs_a_reason():
    with pytest.raises(MoorlineError):
        NotRequired(" ")


def test_an_event_of_no_known_kind_has_to_be_in_the_reference_values():
    """verifies that: what a log calls a measurement is no way around its digest being asked for"""
    seen = facts()
    one = seen.boot.measured[0]
    stranger = dataclasses.replace(one, component=Component.OTHER, digest=b"x" * 32, description=b"harmless")
    boot = dataclasses.replace(seen.boot, measured=(*seen.boot.measured, stranger))
    assert appraise(boot=boot).first_refusal().code == "host.boot_event_not_in_reference_values"
