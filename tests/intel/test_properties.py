"""Any bytes give a value or Malformed; what parses serializes to the same bytes; no flipped bit is ever authentic."""

import contextlib
import dataclasses
import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moorline.errors import Malformed, MoorlineError
from moorline.evidence.ccel import parse_ccel_table
from moorline.evidence.dcap_quote import tee_of
from moorline.evidence.intel_collateral import (
    parse_evaluation_numbers,
    parse_json,
    parse_qe_identity,
    parse_tcb_info,
    signed_document,
)
from moorline.evidence.ratls import parse_oe_report, parse_ratls_certificate
from moorline.evidence.sgx_quote import parse_sgx_quote, serialize_sgx_quote
from moorline.evidence.tdx_quote import parse_tdx_quote, serialize_tdx_quote
from moorline.policy.intel_case import detect
from moorline.verification.intel_endorsements import assemble
from moorline.verification.intel_pck import parse_sgx_extension, pem_certificates, read_pck

PARSERS = (
    tee_of,
    parse_sgx_quote,
    parse_tdx_quote,
    parse_ccel_table,
    parse_oe_report,
    parse_ratls_certificate,
    parse_json,
    parse_tcb_info,
    parse_qe_identity,
    parse_evaluation_numbers,
    lambda data: signed_document(data, chain=None),
    parse_sgx_extension,
    pem_certificates,
    read_pck,
    detect,
    *(lambda data, kind=kind: assemble([(kind, data)]) for kind in ("tcb-info", "collateral-json", "pcs-response-json")),
    *(lambda data, kind=kind: assemble([(kind, data)]) for kind in ("tcb-info-raw-json", "crl-der", "crl-hex", "crl-json")),
    lambda data: assemble([("tcb-info-body", b"{}"), ("chain-pem", data)]),
)
SETTINGS = settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
_CACHE = {}


def evidence(keys, tools, tee):
    """The bytes of a good quote with everything needed to verify it, made once."""
    if tee not in _CACHE:
        fake = tools.FakeIntel(keys, tee)
        quote = fake.quote()
        _CACHE[tee] = fake, (serialize_sgx_quote if tee == "sgx" else serialize_tdx_quote)(quote), fake.endorsements()
    return _CACHE[tee]


def seeds(fake, quote):
    body = fake.tcb_info_body()
    answer = b'{"tcbInfo":' + body + b',"signature":"' + b"00" * 64 + b'"}'
    raw = json.dumps(
        {"raw_tcb_info": body.decode(), "signature": [48, 0], "ca_chain": [fake.chain("signer").decode()]}
    ).encode()
    return [quote, body, fake.qe_identity_body(), answer, raw, fake.chain("pck"), fake.sgx_extension(), fake.crl("ca")]


@pytest.mark.parametrize("parse", PARSERS)
@given(data=st.binary(max_size=700))
@SETTINGS
def test_any_bytes_give_a_value_or_malformed(parse, data):
    """verifies that: no parser raises anything else on bytes from nowhere"""
    with contextlib.suppress(Malformed):
        parse(data)


@pytest.mark.parametrize("parse", PARSERS)
@given(data=st.data())
@SETTINGS
def test_spoiled_files_give_a_value_or_malformed(keys, tools, parse, data):
    """verifies that: nor on good files of any kind that were cut, grown or changed"""
    fake, quote, _ = evidence(keys, tools, data.draw(st.sampled_from(["sgx", "tdx"])))
    if "seeds" not in _CACHE:
        _CACHE["seeds"] = seeds(fake, quote)
    good = data.draw(st.sampled_from([*_CACHE["seeds"], quote]))
    at, end = data.draw(st.integers(0, len(good))), data.draw(st.integers(0, len(good)))
    spoiled = good[:at] + data.draw(st.binary(max_size=6)) + good[max(at, end) if data.draw(st.booleans()) else at :]
    with contextlib.suppress(Malformed):
        parse(spoiled)


@given(data=st.data(), tee=st.sampled_from(["sgx", "tdx"]))
@SETTINGS
def test_what_parses_serializes_to_the_same_bytes(keys, tools, data, tee):
    """verifies that: no byte of a quote is outside some field, whatever the quote"""
    parse, serialize = (parse_sgx_quote, serialize_sgx_quote) if tee == "sgx" else (parse_tdx_quote, serialize_tdx_quote)
    _, good, _ = evidence(keys, tools, tee)
    spoiled = bytearray(good)
    for _ in range(data.draw(st.integers(0, 3))):
        spoiled[data.draw(st.integers(0, len(good) - 1))] = data.draw(st.integers(0, 255))
    if tee == "tdx":
        spoiled += bytes(data.draw(st.integers(0, 40)))
    try:
        quote = parse(bytes(spoiled))
    except Malformed:
        return
    assert serialize(quote) == bytes(spoiled)


@given(data=st.data(), tee=st.sampled_from(["sgx", "tdx"]))
@settings(parent=SETTINGS, max_examples=600)
def test_no_flipped_bit_of_a_quote_is_authentic(keys, tools, data, tee):
    """verifies that: flipping any one bit, certificates and lengths included, never leaves an authentic quote"""
    fake, good, given_ = evidence(keys, tools, tee)
    bit = data.draw(st.integers(0, 8 * len(good) - 1))
    flipped = bytearray(good)
    flipped[bit // 8] ^= 1 << bit % 8
    with pytest.raises(MoorlineError):
        fake.verify((parse_sgx_quote if tee == "sgx" else parse_tdx_quote)(bytes(flipped)), given_)


@given(data=st.data(), part=st.sampled_from(["tcb_info", "qe_identity", "pck_crl", "root_crl"]))
@settings(parent=SETTINGS, max_examples=300)
def test_no_flipped_bit_of_collateral_is_authentic(keys, tools, data, part):
    """verifies that: flipping any one bit of a statement, its signature, its signer's chain or a CRL refuses"""
    fake, good, given_ = evidence(keys, tools, "tdx")
    value = getattr(given_, part)
    document = dataclasses.is_dataclass(value)
    field = data.draw(st.sampled_from(["body", "signature", "chain"])) if document else None
    target = getattr(value, field) if field else value
    bit = data.draw(st.integers(0, 8 * len(target) - 1))
    flipped = bytearray(target)
    flipped[bit // 8] ^= 1 << bit % 8
    changed = dataclasses.replace(value, **{field: bytes(flipped)}) if field else bytes(flipped)
    with pytest.raises(MoorlineError):
        fake.verify(parse_tdx_quote(good), dataclasses.replace(given_, **{part: changed}))


@pytest.mark.parametrize("length", [0, 47, 48, 100, 700, 1200])
def test_a_cut_quote_is_malformed(keys, tools, length):
    """verifies that: a quote cut anywhere is malformed, and a megabyte of anything is refused at once"""
    for tee, parse in (("sgx", parse_sgx_quote), ("tdx", parse_tdx_quote)):
        _, good, _ = evidence(keys, tools, tee)
        with pytest.raises(Malformed, match="quote.truncated"):
            parse(good[:length])
        with pytest.raises(Malformed, match="quote.too_large"):
            parse(good + bytes(1 << 20))


FIELDS = {
    "quote.version": (0, 6),
    "quote.key_type": (2, 3),
    "quote.tee_type": (4, 0x82),
}


@pytest.mark.parametrize("code", FIELDS)
def test_header_fields_have_a_closed_list(keys, tools, code):
    """verifies that: an unknown version, key type or TEE is malformed with its own code"""
    at, value = FIELDS[code]
    for tee, parse in (("sgx", parse_sgx_quote), ("tdx", parse_tdx_quote)):
        _, good, _ = evidence(keys, tools, tee)
        with pytest.raises(Malformed, match=code):
            parse(good[:at] + bytes([value]) + good[at + 1 :])


def test_the_other_tees_quote_is_not_taken(keys, tools):
    """verifies that: each parser takes its own TEE's quotes only, and version 3 carries SGX only"""
    _, enclave, _ = evidence(keys, tools, "sgx")
    _, domain, _ = evidence(keys, tools, "tdx")
    for parse, data in ((parse_sgx_quote, domain), (parse_tdx_quote, enclave)):
        with pytest.raises(Malformed, match="quote.tee_type"):
            parse(data)
    with pytest.raises(Malformed, match="quote.tee_type"):
        tee_of(b"\x03\x00\x02\x00\x81" + bytes(43))


def test_trailing_bytes(keys, tools):
    """verifies that: zeros after a TDX quote are padding, counted and kept; any other trailing byte refuses"""
    fake, domain, given_ = evidence(keys, tools, "tdx")
    padded = parse_tdx_quote(domain + bytes(70))
    assert padded.trailing_zeros == 70
    assert fake.verify(padded, given_).value.trailing_zeros == 70
    with pytest.raises(Malformed, match="quote.trailing"):
        parse_tdx_quote(domain + b"\x00\x01")
    _, enclave, _ = evidence(keys, tools, "sgx")
    with pytest.raises(Malformed, match="quote.trailing"):
        parse_sgx_quote(enclave + b"\x00")


@pytest.mark.parametrize("version", [3, 4, 5])
def test_sgx_quotes_of_every_version(sgx, version):
    """verifies that: versions 3, 4 and 5 of an SGX quote are authentic and exact"""
    sgx.version = version
    data = serialize_sgx_quote(sgx.quote())
    quote = parse_sgx_quote(data)
    assert serialize_sgx_quote(quote) == data
    sgx.verify(quote)


@pytest.mark.parametrize(("version", "td15"), [(4, False), (5, False), (5, True)])
def test_tdx_quotes_of_every_version(tdx, version, td15):
    """verifies that: version 4, and version 5 with either body, are authentic and exact"""
    tdx.version, tdx.td15 = version, td15
    data = serialize_tdx_quote(tdx.quote())
    quote = parse_tdx_quote(data)
    assert serialize_tdx_quote(quote) == data
    tdx.verify(quote)


JSON = {
    "a member twice": b'{"a":1,"a":1}',
    "a float": b'{"a":1.0}',
    "no number": b'{"a":NaN}',
    "a long number": b'{"a":100000000000000000000000}',
    "depth": b'{"a":' * 200000,
    "bytes after it": b"{} x",
    "not UTF-8": b'{"a":"\xff"}',
    "too large": b'{"a":"' + b"x" * (1 << 18) + b'"}',
}


@pytest.mark.parametrize("shape", JSON)
def test_json_is_read_strictly(shape):
    """verifies that: JSON that two readers could read differently, or that has no end, is malformed"""
    with pytest.raises(Malformed, match="intel.document"):
        parse_json(JSON[shape])
