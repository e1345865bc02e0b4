"""The token, on a real SoftHSM: keys stay inside, threads do not crash it, wrong PINs and labels are named."""

from __future__ import annotations

import copy
import stat
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from hypothesis import given, settings
from hypothesis import strategies as st

from moorline.clock import Instant
from moorline.errors import Misconfigured, NotAuthentic
from moorline.hsm.ceremony import generate_keys, public_keys
from moorline.hsm.keys import HSM_IDENTITY, ISSUING_CA, WRAPPING, TokenEcKey
from moorline.hsm.token import LocalToken, initialise_softhsm, open_token
from moorline.nfv import Role, SpiffeId
from moorline.wire import keys

sys.path.insert(0, str(Path(__file__).parent))
from looking import issuing_ca

NOW = Instant(1_800_000_000)

_SEGFAULT_OR_ABORT = {-11, -6, -7}


@pytest.fixture(scope="module")
def threads_token(tmp_path_factory):
    location = initialise_softhsm(tmp_path_factory.mktemp("threads") / "t", label="threads")
    script = (
        "import sys; from pathlib import Path; from moorline.hsm.token import *\n"
        "conf, pin = sys.argv[1:]\n"
        "where = TokenLocation(module=softhsm_module(), label='threads', pin_file=Path(pin),"
        " environment={'SOFTHSM2_CONF': conf})\n"
        "with open_token(where) as token: token.generate_ec_key('signer'); token.generate_wrapping_key('wrapping')\n"
    )
    arguments = [location.environment["SOFTHSM2_CONF"], str(location.pin_file)]
    subprocess.run([sys.executable, "-c", script, *arguments], check=True, timeout=60)
    return arguments


@pytest.mark.parametrize("way", ["safe", "trap"])
def test_two_threads(threads_token, way):
    """verifies that: several threads use one token, and that the same work dies without the second initialisation."""
    script = Path(__file__).with_name("two_threads.py")
    done = subprocess.run([sys.executable, str(script), *threads_token, way], timeout=100, capture_output=True, check=False)
    if way == "safe":
        assert done.returncode == 0, done.stderr.decode()
    else:
        assert done.returncode in _SEGFAULT_OR_ABORT or done.returncode > 0


def test_keys_made_in_the_token_cannot_be_read(token):
    """verifies that: long-lived keys are sensitive and not extractable, in the token's own words."""
    from pkcs11 import Attribute, ObjectClass
    from pkcs11.exceptions import AttributeSensitive

    def look(lane):
        for kind, label in ((ObjectClass.PRIVATE_KEY, HSM_IDENTITY), (ObjectClass.PRIVATE_KEY, ISSUING_CA)):
            found = lane.find(kind, label)
            assert found[Attribute.SENSITIVE]
            assert not found[Attribute.EXTRACTABLE]
            assert found[Attribute.NEVER_EXTRACTABLE]
            with pytest.raises(AttributeSensitive):
                found[Attribute.VALUE]
        assert not lane.find(ObjectClass.SECRET_KEY, WRAPPING)[Attribute.EXTRACTABLE]

    token.sessions.run(look)


def test_a_token_key_offers_no_export(token):
    """verifies that: the key object in Python refuses every way out and survives copying."""
    key = copy.deepcopy(TokenEcKey(token, ISSUING_CA))
    for attempt in (
        key.private_numbers,
        lambda: key.private_bytes(
            serialization.Encoding.DER, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        ),
        lambda: key.exchange(ec.ECDH(), key.public_key()),
    ):
        with pytest.raises(Misconfigured) as caught:
            attempt()
        assert caught.value.code == "token.key_stays"


def test_x509_csr_and_cose_by_the_token(token):
    """verifies that: builders and signers take a token key as they take any other."""
    key = TokenEcKey(token, HSM_IDENTITY)
    signer = keys.KeySigner(key)
    keys.verify(signer.public_key(), signer.sign(b"message"), b"message")
    with pytest.raises(NotAuthentic):
        keys.verify(signer.public_key(), signer.sign(b"message"), b"massage")
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "x")])
    csr = x509.CertificateSigningRequestBuilder().subject_name(name).sign(key, hashes.SHA256())
    assert csr.is_signature_valid


def test_openssl_accepts_what_the_token_signed(ca, identity, provider, tmp_path):
    """verifies that: OpenSSL's own tool verifies leaf, issuing CA, provider, authority, root; and the broker's TLS chain."""
    public = keys.public_bytes(ec.generate_private_key(ec.SECP256R1()).public_key())
    device = SpiffeId(trust_domain="alpha.test", role=Role.DEVICE, segments=("d-1",))
    root = tmp_path / "root.pem"
    root.write_bytes(provider.root.certificate.public_bytes(serialization.Encoding.PEM))
    for name, leaf in (
        ("device", ca.issue(public, device, NOW)),
        ("tls", identity.certify_tls(NOW, life_s=3600).leaf),
    ):
        chain = tmp_path / f"{name}.pem"
        chain.write_bytes(leaf.pem_chain())
        done = subprocess.run(
            ["openssl", "verify", "-x509_strict", "-attime", str(NOW), "-CAfile", root, "-untrusted", chain, chain],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr


def test_another_trust_domain_is_not_issued(ca):
    """verifies that: an issuing CA names nothing outside its trust domain, and neither HSMs nor authorities."""
    from moorline.errors import Refused

    public = keys.public_bytes(ec.generate_private_key(ec.SECP256R1()).public_key())
    for spiffe_id in (
        SpiffeId(trust_domain="beta.test", role=Role.DEVICE, segments=("d",)),
        SpiffeId(trust_domain="alpha.test", role=Role.HSM, segments=("hsm-1",)),
        SpiffeId(trust_domain="alpha.test", role=Role.AUTHORITY, segments=("a",)),
    ):
        with pytest.raises(Refused) as caught:
            ca.issue(public, spiffe_id, NOW)
        assert caught.value.code == "issuing.not_ours"


def test_a_certificate_for_another_key_is_misconfigured(token, provider):
    """verifies that: the issuing CA does not start with the HSM's certificate."""

    with pytest.raises(Misconfigured) as caught:
        issuing_ca(token, provider.signed.hsm, provider.above)
    assert caught.value.code == "issuing.certificate_mismatch"


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_sealed_values_do_not_survive_a_flipped_bit(token, data):
    """verifies that: any change of a sealed value or of its place is refused."""
    sealed = token.seal(WRAPPING, b"secret value", b"place")
    assert token.unseal(WRAPPING, sealed, b"place") == b"secret value"
    bit = data.draw(st.integers(0, len(sealed) * 8 - 1))
    changed = bytearray(sealed)
    changed[bit // 8] ^= 1 << bit % 8
    for forged, place in ((bytes(changed), b"place"), (sealed, b"other"), (sealed[: bit // 8], b"place")):
        with pytest.raises(NotAuthentic) as caught:
            token.unseal(WRAPPING, forged, place)
        assert caught.value.code == "token.unseal"


def test_the_counter_only_rises(token):
    """verifies that: a counter starts at 0, rises by one and leaves one object behind."""
    assert token.counter("test-counter") == 0
    assert [token.advance("test-counter") for _ in range(3)] == [1, 2, 3]
    assert token.counter("test-counter") == 3


def test_a_second_setup_is_refused(token):
    """verifies that: no ceremony overwrites keys."""
    before = public_keys(token)
    with pytest.raises(Misconfigured) as caught:
        generate_keys(token)
    assert caught.value.code == "token.key_exists"
    assert public_keys(token) == before


def test_files_of_a_token_are_private(ceremony):
    """verifies that: token directory and PIN are for the owner only."""
    pin_file = ceremony.location.pin_file
    assert stat.S_IMODE(pin_file.stat().st_mode) == 0o600
    assert stat.S_IMODE((pin_file.parent / "tokens").stat().st_mode) == 0o700


def test_wrong_label_module_and_pin(ceremony, token, tmp_path):
    """verifies that: each wrong part of a token's location is refused with its own code, and the open token is unharmed."""
    location = ceremony.location
    exposed = tmp_path / "pin"
    exposed.write_text("1234")
    exposed.chmod(0o644)
    wrong = {
        "token.login": replace(location, label="nobody"),
        "token.module": replace(location, module="/nonexistent.so"),
        "token.pin_exposed": replace(location, pin_file=exposed),
        "token.pin_file": replace(location, pin_file=tmp_path / "none"),
        "token.module_busy": replace(location, environment={"SOFTHSM2_CONF": "/other"}),
    }
    for code, where in wrong.items():
        with pytest.raises(Misconfigured) as caught:
            open_token(where)
        assert caught.value.code == code
    assert len(token.random(8)) == 8
    assert isinstance(token, LocalToken)
