"""Revocation of TPM makers' certificates: each outcome has its own code, and what is not there is no yes."""

import dataclasses

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given, settings
from hypothesis import strategies as st
from tpm_maker import TpmMaker, der, named, scope

from moorline.clock import Instant
from moorline.errors import Malformed, MoorlineError, NotAuthentic, Unavailable
from moorline.rats import EvidenceRoot
from moorline.verification.tpm_identity import TpmAnchor, verify_endorsement
from moorline.verification.tpm_revocation import MAX_CRL, Revocation, parse_tpm_crl

NOW = Instant(1_790_000_000)
WAIVED = {EvidenceRoot.HARDWARE: "no network here, and no bundle yet"}


@pytest.fixture(scope="module")
def maker():
    return TpmMaker(NOW)


@pytest.fixture(scope="module")
def revoking(maker):
    """The authority's list that revokes the one on the die: signatures are random, a property must see the same bytes."""
    return maker.crl("ca", maker.die)


def judged(maker, *crls, waived=None, brought=None, anchor=None, now=NOW):
    return verify_endorsement(
        maker.public(),
        brought or maker.brought,
        anchors=(anchor or maker.anchor,),
        revocation=Revocation(crls=crls, not_required=waived or {}),
        now=now,
    )


def refusal(maker, *crls, **options):
    with pytest.raises(MoorlineError) as refused:
        judged(maker, *crls, **options)
    return refused.value


def test_a_chain_with_current_lists_of_its_authorities_stands(maker):
    """verifies that: root and authority publish lists, the authority on the die does not, and the lists used are told"""
    lists = (maker.crl("root"), maker.crl("ca"))
    held = judged(maker, *lists)
    assert len(held.value.crls) == 2
    assert held.collateral_digest != judged(maker, *lists, maker.crl("ca", number=9)).collateral_digest


@pytest.mark.parametrize("victim", ["ek", "die", "ca"])
@pytest.mark.parametrize("waived", [None, WAIVED])
def test_whatever_is_revoked_on_the_path_refuses_demanded_or_not(maker, victim, waived):
    issuer = {"ek": "die", "die": "ca", "ca": "root"}[victim]
    crls = {name: maker.crl(name, *([getattr(maker, victim)] if name == issuer else [])) for name in ("root", "ca", "die")}
    refused = refusal(maker, *crls.values(), waived=waived)
    assert (type(refused), refused.code) == (NotAuthentic, "ek.revoked")


@pytest.mark.parametrize("missing", ["root", "ca"])
def test_a_list_that_is_demanded_and_missing_leaves_undecided(maker, missing):
    there = [maker.crl(name) for name in ("root", "ca") if name != missing]
    refused = refusal(maker, *there)
    assert (type(refused), refused.code) == (Unavailable, "ek.crl_missing")
    assert f"maker {missing}" in refused.got
    assert len(judged(maker, *there, waived=WAIVED).value.crls) == 1


def test_nothing_said_about_revocation_refuses_everybody(maker):
    assert refusal(maker).code == "ek.crl_missing"
    assert refusal(maker, waived={EvidenceRoot.VIRTUAL: "another root"}).code == "ek.crl_missing"
    assert judged(maker, waived=WAIVED).value.crls == ()


@pytest.mark.parametrize("waived", [None, WAIVED])
def test_a_list_out_of_its_time_is_none(maker, waived):
    stale = maker.crl("ca", start=-9, end=-1)
    assert refusal(maker, maker.crl("root"), stale, waived=waived).code == "ek.crl_stale"
    early = maker.crl("ca", start=1, end=9)
    assert refusal(maker, maker.crl("root"), early, waived=waived).code == "ek.crl_not_yet_valid"
    edge = maker.crl("ca", start=0, end=1)
    assert judged(maker, maker.crl("root"), edge)
    assert refusal(maker, maker.crl("root"), edge, now=Instant(NOW + 86401)).code == "ek.crl_stale"


def test_the_newest_list_counts_and_an_older_one_put_beside_it_does_not(maker):
    old = maker.crl("ca", start=-3, number=4)
    new = maker.crl("ca", maker.die, start=-1, number=5)
    for order in ((old, new), (new, old)):
        assert refusal(maker, maker.crl("root"), *order).code == "ek.revoked"


def test_a_list_in_an_authoritys_name_by_somebody_else_refuses(maker):
    forged = maker.crl("ca", key=ec.generate_private_key(ec.SECP256R1()))
    for waived in (None, WAIVED):
        assert refusal(maker, maker.crl("root"), forged, waived=waived).code == "ek.crl_signature"
    by_the_root = maker.crl("ca", key=maker.keys["root"])
    assert refusal(maker, maker.crl("root"), by_the_root).code == "ek.crl_signature"


def test_a_list_by_an_authority_that_may_not_sign_lists_refuses(maker):
    mute = maker.certificate("ca", "root", crl_sign=False)
    anchor = dataclasses.replace(maker.anchor, intermediates=(der(mute),))
    assert refusal(maker, maker.crl("root"), maker.crl("ca"), anchor=anchor).code == "ek.crl_signature"


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ({"scope": scope(indirect_crl=True)}, "ek.crl_indirect"),
        ({"scope": scope(only_contains_user_certs=True)}, "ek.crl_partial"),
        ({"scope": scope(only_contains_ca_certs=True)}, "ek.crl_partial"),
        ({"scope": scope(only_some_reasons=frozenset({x509.ReasonFlags.key_compromise}))}, "ek.crl_partial"),
        ({"scope": scope(full_name=[x509.UniformResourceIdentifier("http://maker.test/1")])}, "ek.crl_partial"),
        ({"delta": True}, "ek.crl_partial"),
        ({"scope": x509.UnrecognizedExtension(x509.ObjectIdentifier("1.2.3.4"), b"\x05\x00")}, "ek.crl_partial"),
        ({"entry": x509.CertificateIssuer([x509.DirectoryName(named("other"))])}, "ek.crl_indirect"),
        ({"entry": x509.UnrecognizedExtension(x509.ObjectIdentifier("1.2.3.4"), b"\x05\x00")}, "ek.crl_indirect"),
    ],
)
def test_a_list_of_another_kind_is_not_read_as_a_whole_one(maker, options, code):
    refused = refusal(maker, maker.crl("root"), maker.crl("ca", maker.ca, **options))
    assert (type(refused), refused.code) == (Malformed, code)


def test_a_list_without_an_end_too_large_cut_or_with_something_after_it_is_malformed(maker):
    good = maker.crl("ca")
    for bad in (good[:-1], good + b"\0", b"", bytes(MAX_CRL + 1), der(maker.ca), maker.crl("ca", number=1 << 160)):
        with pytest.raises(Malformed) as refused:
            parse_tpm_crl(bad)
        assert refused.value.code == "ek.crl_malformed"


def test_a_renewed_certificate_of_a_known_authority_does_not_escape_the_demand(maker):
    """verifies that: the attack of bringing another certificate of the same authority, one that names no list, is in vain"""
    renewed = maker.certificate("ca", "root")
    die = maker.certificate("die", "ca")
    brought = (der(maker.ek), der(die), der(renewed))
    assert refusal(maker, maker.crl("root"), brought=brought).code == "ek.crl_missing"
    assert refusal(maker, maker.crl("root"), maker.crl("ca", die), brought=brought).code == "ek.revoked"


def test_a_list_is_demanded_of_an_authority_nobody_configured_if_its_certificate_names_one(maker):
    anchor = TpmAnchor(certificate=der(maker.root), root=EvidenceRoot.HARDWARE)
    brought = (*maker.brought, der(maker.ca))
    assert refusal(maker, maker.crl("root"), brought=brought, anchor=anchor).code == "ek.crl_missing"
    assert judged(maker, maker.crl("root"), maker.crl("ca"), brought=brought, anchor=anchor)


def test_lists_of_strangers_are_no_obstacle_and_no_help(maker):
    other = TpmMaker(NOW)
    other_name = maker.crl("elsewhere", key=other.keys["ca"])
    assert judged(maker, other_name, maker.crl("root"), maker.crl("ca"))
    assert refusal(maker, other_name, maker.crl("root")).code == "ek.crl_missing"


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_no_flipped_bit_of_a_list_lets_a_revoked_certificate_pass(maker, revoking, data):
    """A changed name makes it the list of nobody here, which is missing then; every other change is found out."""
    bad = bytearray(revoking)
    bit = data.draw(st.integers(0, 8 * len(bad) - 1))
    bad[bit // 8] ^= 1 << bit % 8
    with pytest.raises(MoorlineError) as refused:
        judged(maker, maker.crl("root"), bytes(bad))
    assert refused.value.code.startswith("ek.")


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=400))
def test_any_bytes_are_a_list_or_malformed(data):
    with pytest.raises(Malformed):
        parse_tpm_crl(data)
