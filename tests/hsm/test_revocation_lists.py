"""CRLs and OCSP responses signed in the token, judged by openssl; and what the store keeps of them."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509 import ocsp
from hypothesis import given, settings
from hypothesis import strategies as st

from moorline.clock import Instant, Validity
from moorline.errors import Malformed, MoorlineError, Refused
from moorline.hsm import revocation
from moorline.hsm.issuers import Looks
from moorline.hsm.issuing import IssuingCa
from moorline.hsm.revocation import CertificateStatus, RevokedCertificate
from moorline.nfv import SpiffeId
from moorline.services.broker_role import issued
from moorline.storage.broker_revocations import RevocationStore, Revoked
from moorline.wire import keys
from moorline.wire.certificates import Pointers

sys.path.insert(0, str(Path(__file__).parent))
from foreign import openssl
from looking import issuing_ca

POINTERS = Pointers(
    crl="http://revocation.alpha.test/crl/ca-1.crl",
    ocsp="http://revocation.alpha.test/ocsp",
    issuer="http://revocation.alpha.test/ca/ca-1.cer",
)
NOW = Instant(int(time.time()))
LIFE = Validity(not_before=NOW, not_after=Instant(NOW + 3600))


@pytest.fixture
def live_ca(token, real_now):
    return issuing_ca(token, real_now.signed.issuing_ca, real_now.above, published="http://revocation.alpha.test")


def leaf(ca, name="phone-1"):
    public = keys.public_bytes(ec.generate_private_key(ec.SECP256R1()).public_key())
    return ca.issue(public, SpiffeId.parse(f"spiffe://alpha.test/device/{name}"), NOW), public


def listed(*leaves):
    return tuple(
        RevokedCertificate(serial=one.certificate.serial_number, at=NOW, reason=x509.ReasonFlags.key_compromise)
        for one in leaves
    )


@pytest.fixture
def chain(tmp_path, real_now, live_ca):
    """Files openssl wants: root, the CAs between, and the CRLs of every CA above the issuing CA."""
    (tmp_path / "root.pem").write_bytes(real_now.root.certificate.public_bytes(Encoding.PEM))
    above = [x509.load_der_x509_certificate(der) for der in live_ca.chain]
    (tmp_path / "between.pem").write_bytes(b"".join(one.public_bytes(Encoding.PEM) for one in above))
    for issuer, name in ((real_now.root, "root"), (real_now.authority, "authority"), (real_now.issuer, "provider")):
        made = revocation.crl(issuer, (), number=1, validity=LIFE, url=None)
        (tmp_path / f"{name}.crl.pem").write_bytes(x509.load_der_x509_crl(made).public_bytes(Encoding.PEM))
    return tmp_path


def verify(folder, crl):
    (folder / "ca.crl.pem").write_bytes(x509.load_der_x509_crl(crl).public_bytes(Encoding.PEM))
    lists = b"".join((folder / f"{name}.crl.pem").read_bytes() for name in ("ca", "provider", "authority", "root"))
    (folder / "all.crl.pem").write_bytes(lists)
    words = "verify -x509_strict -crl_check_all -extended_crl -CAfile root.pem -untrusted between.pem"
    return openssl(folder, *words.split(), "-CRLfile", "all.crl.pem", "leaf.pem")


def test_openssl_takes_good_and_refuses_revoked_over_the_whole_chain(chain, live_ca):
    good, _ = leaf(live_ca)
    bad, _ = leaf(live_ca, "phone-2")
    made = revocation.crl(live_ca.issuer, listed(bad), number=7, validity=LIFE, url=POINTERS.crl)
    for one, expected in ((good, "OK"), (bad, "certificate revoked")):
        (chain / "leaf.pem").write_bytes(one.certificate.public_bytes(Encoding.PEM))
        done = verify(chain, made)
        assert expected in done.stdout + done.stderr
        assert (done.returncode == 0) is (one is good)
    shown = openssl(chain, "crl", "-in", "ca.crl.pem", "-noout", "-text", "-CAfile", "between.pem").stdout
    assert "X509v3 CRL Number: \n                7" in shown
    assert "Issuing Distribution Point: critical" in shown
    assert POINTERS.crl in shown
    assert "Only User Certificates" in shown
    assert "Key Compromise" in shown


def test_openssl_refuses_a_list_of_another_key_and_one_that_ended(chain, live_ca, real_now):
    good, _ = leaf(live_ca)
    (chain / "leaf.pem").write_bytes(good.certificate.public_bytes(Encoding.PEM))
    forged = revocation.crl(
        type(live_ca.issuer)(certificate=live_ca.issuer.certificate, key=real_now.issuer.key),
        (),
        number=8,
        validity=LIFE,
        url=POINTERS.crl,
    )
    assert "CRL signature failure" in verify(chain, forged).stderr
    past = Validity(not_before=Instant(NOW - 120), not_after=Instant(NOW - 60))
    assert "CRL has expired" in verify(chain, revocation.crl(live_ca.issuer, (), number=9, validity=past, url=None)).stderr
    # A list published elsewhere does not stand in for the one the certificate names.
    elsewhere = revocation.crl(live_ca.issuer, (), number=9, validity=LIFE, url="http://elsewhere.test/x.crl")
    assert "different CRL scope" in verify(chain, elsewhere).stderr


def test_certificates_name_list_responder_and_issuer(live_ca):
    made, _ = leaf(live_ca)
    points = made.certificate.extensions.get_extension_for_class(x509.CRLDistributionPoints).value
    access = made.certificate.extensions.get_extension_for_class(x509.AuthorityInformationAccess).value
    assert points[0].full_name[0].value == POINTERS.crl
    assert [one.access_location.value for one in access] == [POINTERS.ocsp, POINTERS.issuer]
    assert made.not_after - NOW <= 3600


def request_for(certificate, issuer, nonce=None):
    builder = ocsp.OCSPRequestBuilder().add_certificate(certificate, issuer, hashes.SHA1())
    if nonce is not None:
        builder = builder.add_extension(x509.OCSPNonce(nonce), critical=False)
    return builder.build().public_bytes(Encoding.DER)


@pytest.mark.parametrize(("status", "said"), [("good", "good"), ("revoked", "revoked"), ("unknown", "unknown")])
def test_openssl_reads_and_verifies_each_answer(chain, live_ca, status, said):
    one, _ = leaf(live_ca)
    (chain / "leaf.pem").write_bytes(one.certificate.public_bytes(Encoding.PEM))
    (chain / "ca.pem").write_bytes(live_ca.issuer.certificate.public_bytes(Encoding.PEM))
    openssl(chain, *["ocsp", "-issuer", "ca.pem", "-cert", "leaf.pem", "-reqout", "request.der"])
    question = revocation.parse_ocsp((chain / "request.der").read_bytes())
    revocation.about(live_ca.issuer, question)
    known = CertificateStatus(issued=status != "unknown", revoked=listed(one)[0] if status == "revoked" else None)
    (chain / "answer.der").write_bytes(revocation.ocsp_answer(live_ca.issuer, question, known, validity=LIFE))
    words = "ocsp -issuer ca.pem -cert leaf.pem -respin answer.der -CAfile root.pem -verify_other between.pem -no_nonce"
    done = openssl(chain, *words.split())
    assert "Response verify OK" in done.stderr
    assert f"leaf.pem: {said}" in done.stdout
    answer = ocsp.load_der_ocsp_response((chain / "answer.der").read_bytes())
    assert answer.extensions.get_extension_for_class(x509.OCSPNonce).value.nonce == question.nonce


def test_an_answer_that_was_changed_does_not_verify(chain, live_ca):
    one, _ = leaf(live_ca)
    (chain / "leaf.pem").write_bytes(one.certificate.public_bytes(Encoding.PEM))
    (chain / "ca.pem").write_bytes(live_ca.issuer.certificate.public_bytes(Encoding.PEM))
    question = revocation.parse_ocsp(request_for(one.certificate, live_ca.issuer.certificate))
    revoked = CertificateStatus(issued=True, revoked=listed(one)[0])
    answer = bytearray(revocation.ocsp_answer(live_ca.issuer, question, revoked, validity=LIFE))
    answer[-8] ^= 1
    (chain / "answer.der").write_bytes(answer)
    words = "ocsp -issuer ca.pem -cert leaf.pem -respin answer.der -CAfile root.pem -verify_other between.pem -no_nonce"
    assert "Response Verify Failure" in openssl(chain, *words.split()).stderr


def test_another_issuer_is_never_good(live_ca, real_now):
    one, _ = leaf(live_ca)
    question = revocation.parse_ocsp(request_for(one.certificate, real_now.issuer.certificate))
    with pytest.raises(Refused, match="ocsp.other_issuer"):
        revocation.about(live_ca.issuer, question)


@pytest.mark.parametrize("nonce", [b"", b"n" * 129])
def test_a_nonce_of_odd_length_is_refused(live_ca, nonce):
    one, _ = leaf(live_ca)
    with pytest.raises(Malformed):
        revocation.parse_ocsp(request_for(one.certificate, live_ca.issuer.certificate, nonce))


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=300))
def test_any_bytes_are_a_question_or_malformed(data):
    try:
        revocation.parse_ocsp(data)
    except Malformed:
        return


REQUEST = (
    ocsp.OCSPRequestBuilder()
    .add_certificate_by_hash(b"n" * 20, b"k" * 20, 77, hashes.SHA1())
    .add_extension(x509.OCSPNonce(b"n" * 16), critical=False)
    .build()
    .public_bytes(Encoding.DER)
)


@settings(max_examples=200, deadline=None)
@given(st.integers(0, len(REQUEST) - 1), st.integers(1, 255))
def test_a_changed_request_is_a_question_or_malformed(at, change):
    changed = bytearray(REQUEST)
    changed[at] ^= change
    try:
        revocation.parse_ocsp(bytes(changed))
    except Malformed:
        return


# What the store keeps ----------------------------------------------------------------------------------------------------


@pytest.fixture
def revocations(store):
    return RevocationStore(store)


def recorded(store, ca, name="phone-1"):
    made, public = leaf(ca, name)
    row = issued(made, SpiffeId.parse(f"spiffe://alpha.test/device/{name}"), public)
    store.record_certificate(row, kind="device-enrolled", at=NOW)
    return row


def test_a_revocation_counts_at_once_and_waits_for_the_ledger(store, revocations, live_ca):
    row = recorded(store, live_ca)
    assert [one.serial for page in revocations.unexpired(NOW) for one in page] == [row.serial]
    revocations.revoke(row.serial, reason="key_compromise", at=NOW)
    revocations.revoke(row.serial, reason="superseded", at=NOW)  # again changes nothing
    known, found = revocations.find(row.serial)
    assert known
    assert (found.reason, found.height) == ("key_compromise", None)
    assert [one.serial for one in revocations.pending()] == [row.serial]
    assert list(revocations.unexpired(NOW)) == []
    revocations.committed(row.serial, height=9, at=NOW)
    assert revocations.pending() == ()
    assert revocations.listed(expired_after=NOW)[0].height == 9
    assert revocations.listed(expired_after=Instant(row.not_after + 1)) == ()


def test_a_stranger_is_not_revoked(revocations):
    with pytest.raises(Refused, match="revocation.unknown_certificate"):
        revocations.revoke("abc", reason="unspecified", at=NOW)


def test_what_the_ledger_says_is_kept_once_and_does_not_undo_what_was_decided_here(store, revocations, live_ca):
    mine, theirs = recorded(store, live_ca), recorded(store, live_ca, "phone-2")
    revocations.revoke(mine.serial, reason="key_compromise", at=NOW)
    said = tuple(
        Revoked(
            serial=one.serial,
            spiffe_id=one.spiffe_id,
            not_after=one.not_after,
            at=NOW,
            reason="unspecified",
            data=None,
            height=4,
        )
        for one in (mine, theirs)
    )
    for _ in range(2):
        revocations.learn(said)
    assert {one.serial: (one.reason, one.height) for one in revocations.listed(expired_after=NOW)} == {
        mine.serial: ("key_compromise", None),
        theirs.serial: ("unspecified", 4),
    }


def test_numbers_of_lists_rise_also_after_yesterdays_database_came_back(revocations, store):
    first = [revocations.next_crl_number(NOW) for _ in range(3)]
    assert first == [NOW, NOW + 1, NOW + 2]
    with store.transaction() as c:
        store.set_fact_in(c, "crl-number", 5)
    assert revocations.next_crl_number(Instant(NOW + 60)) > first[-1]


def test_more_than_a_page_of_certificates_is_seen_once_each(store, revocations, live_ca, monkeypatch):
    monkeypatch.setattr("moorline.storage.broker_revocations._PAGE", 3)
    made = {recorded(store, live_ca, f"phone-{n}").serial for n in range(8)}
    seen = [one.serial for page in revocations.unexpired(NOW) for one in page]
    assert len(seen) == len(made)
    assert set(seen) == made


def test_the_command_line_makes_and_shows_a_list(tmp_path, real_now):
    from cryptography.hazmat.primitives import serialization

    key = real_now.issuer.key.private_bytes(Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    (tmp_path / "key.pem").write_bytes(key)
    (tmp_path / "ca.pem").write_bytes(real_now.issuer.certificate.public_bytes(Encoding.PEM))

    def moor(*words):
        return subprocess.run(
            [sys.executable, "-m", "moorline.cli", "crl", *words],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )

    made = moor(*["make", "--certificate", "ca.pem", "--key", "key.pem", "--out", "p.crl", "--serial", "2a", "--json"])
    assert made.returncode == 0, made.stderr
    shown = moor("show", "p.crl", "--json")
    assert '"revoked": ["2a"]' in shown.stdout
    assert moor("show", "key.pem").returncode == 2
    wrong = ["make", "--certificate", "ca.pem", "--key", "key.pem", "--out", "q.crl", "--serial", "xyz"]
    assert moor(*wrong).returncode == 2
    assert openssl(tmp_path, *["crl", "-in", "p.crl", "-CAfile", "ca.pem", "-noout"]).stderr.strip() == "verify OK"


def test_nothing_is_issued_without_a_young_look_at_the_ledger(token, real_now):
    """verifies that: no look, or one that is too old, is Unavailable with a time; a look that ends the CA is a refusal."""
    made = IssuingCa(
        token,
        certificate=real_now.signed.issuing_ca,
        above=real_now.above,
        trust_domain="alpha.test",
        life_s=3600,
        looks=Looks(last_s=30, every_s=5),
    )
    public = keys.public_bytes(ec.generate_private_key(ec.SECP256R1()).public_key())

    def issued_at(now):
        try:
            made.issue(public, SpiffeId.parse("spiffe://alpha.test/device/d-1"), Instant(now))
        except MoorlineError as error:
            return error.code, getattr(error, "retry_after_s", None)
        return "issued", None

    assert issued_at(NOW) == ("issuing.not_seen", 5)
    made.issuers.looked(frozenset(), at=NOW)
    assert [issued_at(NOW + after)[0] for after in (0, 30, 31)] == ["issued", "issued", "issuing.not_seen"]
    made.issuers.looked(frozenset(made.living), at=Instant(NOW + 31))
    assert issued_at(NOW + 31) == ("issuing.ca_revoked", None)


@pytest.mark.parametrize("life_s", [60, 3540, 7200, 10**6])
def test_no_certificate_lives_longer_than_an_hour_whatever_the_settings_say(token, real_now, life_s):
    ca = issuing_ca(token, real_now.signed.issuing_ca, real_now.above, life_s=life_s)
    made = leaf(ca)[0].certificate
    lives = (made.not_valid_after_utc - made.not_valid_before_utc).total_seconds()
    assert lives == min(life_s + 60, 3600)
