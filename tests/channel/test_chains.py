"""verify_chain takes a good chain and refuses every bad twin, with the code that says why."""

import ipaddress

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, mldsa
from cryptography.x509.oid import ExtendedKeyUsageOID
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moorline.clock import Instant
from moorline.errors import Malformed, MoorlineError, NotAuthentic
from moorline.verification.chains import VerifiedChain, verify_ca, verify_chain
from moorline.wire.certificates import Issuer


def der(certificate):
    return certificate.public_bytes(serialization.Encoding.DER)


def code_of(leaf, consortium, *, intermediates=None, roots=None, now=None):
    with pytest.raises(MoorlineError) as caught:
        verify_chain(
            der(leaf),
            consortium.intermediates if intermediates is None else intermediates,
            consortium.roots if roots is None else roots,
            consortium.now if now is None else now,
        )
    return caught.value.code


def test_a_function_under_the_issuing_ca_is_authentic(consortium):
    leaf = consortium.leaf("svc/records/i-1")
    chain = verify_chain(der(leaf), consortium.intermediates, consortium.roots, consortium.now)
    assert str(chain.spiffe_id) == "spiffe://alpha.test/svc/records/i-1"
    issuers = (consortium.ca, consortium.provider, consortium.authority, consortium.root)
    assert chain.path == (der(leaf), *(der(issuer.certificate) for issuer in issuers))
    assert chain.provider == der(consortium.provider.certificate)
    assert (chain.issuer, chain.root, chain.serial) == (chain.path[1], chain.path[-1], 77)


def test_a_broker_under_its_hsm_is_authentic(consortium):
    leaf = consortium.leaf("hsm/hsm-1", issuer=consortium.hsm)
    chain = verify_chain(der(leaf), consortium.intermediates, consortium.roots, consortium.now)
    assert chain.issuer == der(consortium.hsm.certificate)


def test_an_authority_stands_below_itself_and_nobody_else_does(consortium):
    own = consortium.leaf("authority/authority-1", issuer=consortium.authority)
    assert verify_chain(der(own), consortium.intermediates, consortium.roots, consortium.now).provider is None
    assert code_of(consortium.leaf("hsm/hsm-1", issuer=consortium.authority), consortium) == "chain.no_provider"
    assert code_of(consortium.leaf("authority/authority-1"), consortium) == "chain.no_provider"


def test_another_root_is_refused(consortium, stranger):
    leaf = stranger.leaf("svc/records/i-1")
    assert code_of(leaf, stranger, roots=consortium.roots) == "chain.untrusted"
    # The twin's own root sent along as an intermediate changes nothing.
    along = (*stranger.intermediates, *stranger.roots)
    assert code_of(leaf, stranger, intermediates=along, roots=consortium.roots) == "chain.untrusted"
    mixed = (*consortium.intermediates, *stranger.intermediates)[:8]
    assert code_of(leaf, stranger, intermediates=mixed, roots=consortium.roots) in {"chain.untrusted", "chain.signature"}


def test_no_roots_accept_nothing(consortium):
    assert code_of(consortium.leaf("svc/records/i-1"), consortium, roots=()) == "chain.untrusted"


def test_an_intermediate_is_no_root(consortium):
    provider = (der(consortium.provider.certificate),)
    assert code_of(consortium.leaf("svc/records/i-1"), consortium, roots=provider) == "chain.untrusted"


def test_time_is_the_callers(consortium):
    leaf = consortium.leaf("svc/records/i-1", not_before=0, life=600)
    assert code_of(leaf, consortium, now=Instant(consortium.now + 601)) == "chain.expired"
    assert code_of(leaf, consortium, now=Instant(consortium.now - 1)) == "chain.not_yet_valid"
    verify_chain(der(leaf), consortium.intermediates, consortium.roots, Instant(consortium.now + 599))


@pytest.mark.parametrize(
    "names",
    [
        {"uris": ["spiffe://beta.test/svc/records/i-1"]},
        {"uris": ["spiffe://sub.alpha.test/svc/records/i-1"]},
        {"uris": ["spiffe://alpha.test/svc/records/i-1"], "dns": ["i-1.beta.test"]},
        {"uris": ["spiffe://alpha.test/svc/records/i-1"], "ips": [ipaddress.ip_address("127.0.0.1")]},
        {"uris": ["spiffe://alpha.test/svc/records/i-1"], "ips": [ipaddress.ip_address("::1")]},
    ],
)
def test_a_name_outside_the_constraint_is_refused(consortium, names):
    assert code_of(consortium.raw_leaf(**names), consortium) == "chain.name_constraint"


def test_a_provider_constrained_to_another_domain_is_refused(make_consortium, consortium):
    twin = make_consortium(trust_domain="alpha.test", above=consortium, constrained_to="beta.test")
    leaf = twin.raw_leaf(uris=["spiffe://alpha.test/svc/records/i-1"])
    assert code_of(leaf, twin) == "chain.name_constraint"


def test_a_constraint_wider_than_one_trust_domain_is_refused(make_consortium, consortium):
    """OpenSSL lets ".alpha.test" permit every subdomain; the exact comparison of ours does not."""
    twin = make_consortium(trust_domain="sub.alpha.test", above=consortium, constrained_to=".alpha.test")
    assert code_of(twin.leaf("svc/records/i-1"), twin) == "chain.trust_domain"


def test_a_ca_below_its_path_length_is_refused(consortium):
    extra_key = ec.generate_private_key(ec.SECP256R1())
    extra = consortium.raw_leaf(ca=True, usages=(), key=extra_key, issuer=consortium.ca, path_length=0)
    leaf = consortium.leaf("svc/records/i-1", issuer=Issuer(certificate=extra, key=extra_key))
    with_extra = (der(extra), *consortium.intermediates)
    assert code_of(leaf, consortium, intermediates=with_extra) == "chain.path_length"


def test_a_leaf_signs_nothing(consortium):
    key = ec.generate_private_key(ec.SECP256R1())
    parent = consortium.leaf("svc/records/i-1", key=key)
    child = consortium.leaf("svc/records/i-2", issuer=Issuer(certificate=parent, key=key))
    assert code_of(child, consortium, intermediates=(der(parent), *consortium.intermediates)) == "chain.not_ca"


def test_a_forged_signature_is_refused(consortium, stranger):
    forged = consortium.raw_leaf(uris=["spiffe://alpha.test/svc/records/i-1"], sign=stranger.ca.key)
    assert code_of(forged, consortium) == "chain.signature"


@pytest.mark.parametrize(
    "how",
    [
        {"usages": ()},
        {"usages": [ExtendedKeyUsageOID.CLIENT_AUTH]},
        {"usages": [ExtendedKeyUsageOID.SERVER_AUTH]},
        {"usages": [ExtendedKeyUsageOID.CODE_SIGNING]},
    ],
)
def test_a_leaf_must_say_it_is_for_tls_both_ways(consortium, how):
    leaf = consortium.raw_leaf(uris=["spiffe://alpha.test/svc/records/i-1"], **how)
    assert code_of(leaf, consortium) == "chain.usage"


def test_a_ca_is_no_leaf(consortium):
    assert code_of(consortium.hsm.certificate, consortium) == "chain.usage"
    path = verify_ca(der(consortium.hsm.certificate), consortium.intermediates, consortium.roots, consortium.now)
    assert len(path) == 4
    with pytest.raises(NotAuthentic) as caught:
        verify_ca(der(consortium.leaf("svc/records/i-1")), consortium.intermediates, consortium.roots, consortium.now)
    assert caught.value.code == "chain.not_ca"


@pytest.mark.parametrize(
    "uris", [[], ["spiffe://alpha.test/svc/r/a", "spiffe://alpha.test/svc/r/b"], ["https://alpha.test/x"]]
)
def test_a_leaf_has_exactly_one_spiffe_id(consortium, uris):
    assert code_of(consortium.raw_leaf(uris=uris, dns=["a.alpha.test"]), consortium) == "chain.spiffe_id"


def test_a_missing_link_is_refused(consortium):
    leaf = consortium.leaf("svc/records/i-1")
    for missing in consortium.intermediates[0], consortium.intermediates[2], consortium.intermediates[3]:
        rest = tuple(one for one in consortium.intermediates if one != missing)
        assert code_of(leaf, consortium, intermediates=rest) == "chain.untrusted"
    assert code_of(leaf, consortium, intermediates=consortium.intermediates * 3) == "chain.too_long"


def test_a_verified_chain_is_not_made_by_hand(consortium):
    with pytest.raises(TypeError):
        VerifiedChain(proof=object(), leaf=None, path=(), spiffe_id=None, provider=None)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.binary(max_size=600))
def test_any_bytes_are_refused_as_malformed(consortium, data):
    with pytest.raises(Malformed):
        verify_chain(data, consortium.intermediates, consortium.roots, consortium.now)


def test_no_flipped_bit_is_ever_accepted(consortium):
    good = der(consortium.leaf("svc/records/i-1"))
    verify_chain(good, consortium.intermediates, consortium.roots, consortium.now)
    for at in range(0, len(good) * 8, 3):
        bad = bytearray(good)
        bad[at // 8] ^= 1 << (at % 8)
        with pytest.raises(MoorlineError):
            verify_chain(bytes(bad), consortium.intermediates, consortium.roots, consortium.now)


def test_an_experimental_key_is_certified_for_others_and_taken_by_no_end_of_ours(consortium):
    """verifies that: a leaf for an ML-DSA-65 key chains by signature, and is refused by what it is."""
    leaf = consortium.leaf("svc/records/i-1", key=mldsa.MLDSA65PrivateKey.generate())
    leaf.verify_directly_issued_by(consortium.ca.certificate)
    assert code_of(leaf, consortium) == "chain.key_unsupported"
