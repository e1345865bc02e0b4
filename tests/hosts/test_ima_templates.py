"""IMA lists in every template, ASCII and binary: written back to the same bytes, replayed, never half believed."""

import hashlib
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import Prehashed
from hypothesis import given, settings
from hypothesis import strategies as st

from moorline.errors import Malformed, NotAuthentic, Unavailable
from moorline.evidence import ima as lists
from moorline.evidence.tpm_structures import ALG_SHA1, ALG_SHA256, ALG_SM3_256
from moorline.policy import host
from moorline.verification import ima, ima_signature

OWN = Path(__file__).parents[3] / "shared" / "vectors" / "own"
FILES = {b"/usr/bin/a": frozenset({b"a" * 32}), b"/opt/with space/\xff\xfe": frozenset({b"b" * 20, b"c" * 32})}


def sealed(entry, algorithm="sha1"):
    """An entry with the template hash that its fields have."""
    return entry._replace(template_hash=hashlib.new(algorithm, entry.template_data()).digest())


@st.composite
def entries(draw, template_hash="sha1"):
    template = draw(st.sampled_from(lists.TEMPLATES))
    algorithm = "sha1" if template == "ima" else draw(st.sampled_from(sorted(lists.DIGEST_SIZES)))
    size = lists.DIGEST_SIZES[algorithm]
    path = draw(st.binary(min_size=1, max_size=60).filter(lambda one: not {0, 10} & set(one)))
    extra = draw(st.binary(max_size=80)) if template in ("ima-sig", "ima-sigv2", "ima-buf", "ima-modsig") else b""
    kind = draw(st.sampled_from(("ima", "verity"))) if template in ("ima-ngv2", "ima-sigv2") else ""
    appended = ("sha256", draw(st.binary(min_size=32, max_size=32)), draw(st.binary(max_size=80)))
    if template != "ima-modsig" or draw(st.booleans()):
        appended = ("", b"", b"")
    digest = draw(st.binary(min_size=size, max_size=size))
    return sealed(lists.ImaEntry(10, b"", template, algorithm, digest, path, extra, kind, *appended), template_hash)


@settings(max_examples=150, deadline=None)
@given(st.lists(entries(), max_size=4))
def test_every_template_is_written_back_to_the_same_bytes(given_entries):
    text = b"".join(lists.serialize_line(one) + b"\n" for one in given_entries)
    parsed = lists.parse_ima(text)
    assert list(parsed) == given_entries
    assert b"".join(lists.serialize_line(one) + b"\n" for one in parsed) == text
    binary = lists.serialize_binary(parsed)
    assert lists.parse_binary(binary) == parsed
    quoted = ima.replay(parsed, ALG_SHA256)
    assert ima.verify_ima(ima.initial(ALG_SHA256), text, bank=ALG_SHA256, quoted=quoted).entries == parsed
    assert ima.verify_entries(ima.initial(ALG_SHA256), parsed, bank=ALG_SHA256, quoted=quoted).entries == parsed


@settings(max_examples=60, deadline=None)
@given(st.lists(entries("sha256"), min_size=1, max_size=3))
def test_a_binary_list_with_wider_template_hashes_is_recognised(given_entries):
    binary = lists.serialize_binary(tuple(given_entries))
    assert lists.serialize_binary(lists.parse_binary(binary)) == binary
    assert [one.path for one in lists.parse_binary(binary)] == [one.path for one in given_entries]


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=300), st.lists(entries(), max_size=2))
def test_any_bytes_are_a_binary_list_or_malformed(noise, given_entries):
    good = lists.serialize_binary(tuple(given_entries))
    for data in (noise, good + noise, noise + good):
        try:
            parsed = lists.parse_binary(data)
        except Malformed:
            continue
        assert lists.serialize_binary(parsed) == data


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_no_flipped_bit_of_a_binary_list_replays(data):
    good = tuple(data.draw(st.lists(entries(), min_size=1, max_size=2)))
    changed = bytearray(lists.serialize_binary(good))
    bit = data.draw(st.integers(0, len(changed) * 8 - 1))
    changed[bit // 8] ^= 1 << (bit % 8)
    quoted = ima.replay(good, ALG_SHA256)
    with pytest.raises((Malformed, NotAuthentic)):
        ima.verify_entries(ima.initial(ALG_SHA256), lists.parse_binary(bytes(changed)), bank=ALG_SHA256, quoted=quoted)


def test_the_oldest_template_hashes_its_name_in_256_bytes():
    entry = sealed(lists.ImaEntry(10, b"", "ima", "sha1", b"d" * 20, b"/sbin/init", b""))
    assert entry.template_hash == hashlib.sha1(b"d" * 20 + b"/sbin/init" + bytes(246)).digest()
    assert lists.serialize_line(entry).endswith(b" ima " + (b"d" * 20).hex().encode() + b" /sbin/init")


@pytest.mark.parametrize(
    ("line", "code"),
    [
        (b"10 H ima-ngv2 sha256:D /x", "ima.digest_type"),
        (b"10 H ima-ngv2 other:sha256:D /x", "ima.digest_type"),
        (b"10 H ima-ng whirlpool:D /x", "ima.algorithm_unknown"),
        (b"10 H ima-ng sha256:DD /x", "ima.line"),
        (b"10 H ima-new sha256:D /x", "ima.template_unknown"),
        (b"10 H ima-modsig sha256:D /x 00 ", "ima.line"),
        (b"10 H ima-sig sha256:D /x 0G", "ima.line"),
        (b"10 H ima-sig sha256:D /x AA", "ima.line"),
        (b"010 H ima-ng sha256:D /x", "ima.line"),
        (b"10 H ima-ng sha256:D " + b"p" * 4097, "ima.path"),
        (b"10 H ima-ng sha256:D /a\x00b", "ima.path"),
        (b"10 H ima-ng sha256:D /x" + b"p" * 20000, "ima.too_large"),
    ],
)
def test_what_is_no_line_is_told_why(line, code):
    text = line.replace(b"H", b"ab" * 20).replace(b"D", b"cd" * 32)
    with pytest.raises(Malformed) as refused:
        lists.parse_line(text)
    assert refused.value.code == code


def test_allowed_lines_are_what_the_long_way_finds():
    """verifies that: the shortcut proves exactly the entries that the long way proves, and counts them alike"""
    allowed = ima.AllowedLines.load(FILES, bank=ALG_SHA256, templates=("ima-ng", "ima-sig", "ima-ngv2"))
    assert len(allowed.extensions) == 9
    lines = sorted(allowed.extensions)
    stranger = lists.serialize_line(sealed(lists.ImaEntry(10, b"", "ima-ng", "sha256", b"x" * 32, b"/tmp/x", b"")))
    violation = b"10 " + b"0" * 40 + b" ima-ng sha256:" + b"0" * 64 + b" /usr/bin/a"
    text = b"\n".join([*lines[:4], stranger, violation, *lines[4:], b""])
    quoted = ima.replay(lists.parse_ima(text), ALG_SHA256)
    plain = ima.verify_ima(ima.initial(ALG_SHA256), text, bank=ALG_SHA256, quoted=quoted)
    short = ima.verify_ima(ima.initial(ALG_SHA256), text, bank=ALG_SHA256, quoted=quoted, allowed=allowed)
    assert short.state == plain.state
    assert (short.allowed, len(short.entries), len(plain.entries)) == (9, 2, 11)

    class Values:
        files = FILES

    judged = [
        host.appraise_files(host.NO_FILES, one.entries, reference=Values, aggregate=b"", allowed=one.allowed)
        for one in (plain, short)
    ]
    assert judged[0] == judged[1]
    assert (judged[0].entries, judged[0].unlisted, judged[0].violations) == (11, 1, 1)


def test_an_allowed_line_that_was_not_measured_is_refused():
    allowed = ima.AllowedLines.load(FILES, bank=ALG_SHA256, templates=("ima-ng",))
    first, *others = sorted(allowed.extensions)
    quoted = ima.replay(lists.parse_ima(first + b"\n"), ALG_SHA256)
    for text in (others[0] + b"\n", first.replace(b"/", b"\\") + b"\n"):
        with pytest.raises(NotAuthentic):
            ima.verify_ima(ima.initial(ALG_SHA256), text, bank=ALG_SHA256, quoted=quoted, allowed=allowed)


def test_lines_of_another_bank_or_that_cannot_be_lines_are_no_shortcut():
    odd = {b"/a\nb": {b"a" * 32}, b"": {b"a" * 32}, b"p" * 5000: {b"a" * 32}, b"/short": {b"abc"}}
    assert not ima.AllowedLines.load(odd, bank=ALG_SHA256, templates=("ima-ng",)).extensions
    sha1 = ima.AllowedLines.load(FILES, bank=ALG_SHA1, templates=("ima-ng",))
    text = next(iter(sha1.extensions)) + b"\n"
    quoted = ima.replay(lists.parse_ima(text), ALG_SHA256)
    assert ima.verify_ima(ima.initial(ALG_SHA256), text, bank=ALG_SHA256, quoted=quoted, allowed=sha1).allowed == 0


def test_a_bank_without_a_hash_is_told_and_not_crashed_over():
    with pytest.raises(Unavailable) as told:
        ima.verify_ima(ima.initial(ALG_SM3_256), b"", bank=ALG_SM3_256, quoted=bytes(32))
    assert told.value.code == "ima.hash_unsupported"


@pytest.mark.parametrize("name", ["sb-off", "sb-on", "uki-sb-on"])
def test_both_forms_of_a_real_list_are_one_list_and_replay(name):
    if not (OWN / name).is_dir():
        pytest.skip("no shared vectors")
    text, binary = (OWN / name / "ima.ascii").read_bytes(), (OWN / name / "ima.bin").read_bytes()
    parsed = lists.parse_ima(text)
    assert lists.parse_binary(binary) == parsed
    assert lists.serialize_binary(parsed) == binary
    assert b"".join(lists.serialize_line(one) + b"\n" for one in parsed) == text
    quoted = ima.replay(parsed, ALG_SHA256)
    assert quoted.hex() in (OWN / name / "pcrs.txt").read_text().lower()


def signed_entry(key, *, digest_type, form, signed):
    """An ima-sigv2 entry whose signature is over `signed`."""
    spki = key.public_key().public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    trusted = ima_signature.load_key(spki)
    signature = key.sign(signed, ec.ECDSA(Prehashed(hashes.SHA256())))
    extra = form + b"\x04" + trusted.identifier + len(signature).to_bytes(2, "big") + signature
    return trusted, lists.ImaEntry(10, b"", "ima-sigv2", "sha256", b"d" * 32, b"/x", extra, digest_type)


def test_a_signature_is_over_the_kind_of_digest_the_entry_has():
    """verifies that: a signature over contents does not pass for one over an fs-verity digest, nor the other way round"""
    key = ec.generate_private_key(ec.SECP256R1())
    verity = hashlib.sha256(b"\x06\x04" + b"d" * 32).digest()
    for digest_type, form, signed, holds in (
        ("ima", b"\x03\x02", b"d" * 32, True),
        ("verity", b"\x06\x03", verity, True),
        ("verity", b"\x06\x03", b"d" * 32, False),
        ("verity", b"\x03\x02", b"d" * 32, False),
        ("ima", b"\x06\x03", verity, False),
        ("ima", b"\x06\x03", b"d" * 32, False),
    ):
        trusted, made = signed_entry(key, digest_type=digest_type, form=form, signed=signed)
        assert ima_signature.is_signed(made, [trusted]) is holds
