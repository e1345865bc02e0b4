"""Bad input, one row a trick: transactions, certificates and names, each refused with its code and without a trace."""

import warnings
from dataclasses import replace

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hypothesis import example, given, settings
from hypothesis import strategies as st

from moorline.clock import Instant, to_datetime
from moorline.ledger import state, transactions
from moorline.ledger import transactions as tx
from moorline.ledger.records import RevocationKind
from moorline.ledger.state import Applied, Rejected
from moorline.wire import cbor, certificates, cose, keys
from moorline.wire.der import bits, sequence

from .conftest import NOW
from .everything import World, package, spki
from .test_registration import PLATFORM, SERVICE


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return World(tmp_path_factory.mktemp("world") / "c")


def code_of(world, data):
    """What comes of these bytes; the state root must not move unless they apply."""
    found = world.consortium.state
    done = state.execute(found, [data], time_ms=world.consortium.now_ms + 1000)
    (outcome,) = done.outcomes
    if isinstance(outcome, Rejected):
        assert done.state.root == found.root
        return outcome.code
    return None


def tried(world, body, label="alpha"):
    return code_of(world, world.signed(label, body))


# The envelope ------------------------------------------------------------------------------------------------------------


def good(world):
    return world.signed("alpha", PLATFORM_2)


PLATFORM_2 = replace(PLATFORM, id="h2", chip_id=b"d" * 64)


def envelope(world, **changes):
    """The good transaction signed over a payload map with these changes; None takes a field out."""
    sender = world.senders["alpha"]
    payload = cbor.decode(transactions.parse(good(world)).sign1.payload)
    for name, value in changes.items():
        if value is None:
            del payload[name]
        else:
            payload[name] = value
    return cose.sign(transactions.PURPOSE, cbor.encode(payload), sender.signer)


def test_the_good_transaction_passes(world):
    """verifies that: the rows below differ from something that applies (control)."""
    assert code_of(world, good(world)) is None
    assert code_of(world, envelope(world)) is None


ENVELOPES = {
    "nothing": lambda w: b"",
    "not CBOR": lambda w: b"\xff" * 40,
    "cut short": lambda w: good(w)[:-1],
    "a byte more": lambda w: good(w) + b"\x00",
    "untagged": lambda w: good(w)[1:],
    "another tag": lambda w: b"\xd1" + good(w)[1:],
    "long array head": lambda w: good(w)[:1] + b"\x98\x04" + good(w)[2:],
    "indefinite array": lambda w: good(w)[:1] + b"\x9f" + good(w)[2:] + b"\xff",
    "too large": lambda w: good(w) + bytes(transactions.MAX_TRANSACTION_BYTES),
    "nested deeply": lambda w: b"\xd2" + b"\x81" * 60000,
    "field missing": lambda w: envelope(w, nonce=None),
    "field more": lambda w: envelope(w, comment="x"),
    "nonce too short": lambda w: envelope(w, nonce=bytes(31)),
    "nonce no bytes": lambda w: envelope(w, nonce="0" * 32),
    "height negative": lambda w: envelope(w, valid_until=-1),
    "height no number": lambda w: envelope(w, valid_until=True),
    "sender of no kind": lambda w: envelope(w, sender={"kind": "root", "name": "alpha"}),
    "body no map": lambda w: envelope(w, body=b"\x80"),
    "body not canonical": lambda w: envelope(w, body=b"\xbf\xff"),
    "body of another kind": lambda w: envelope(w, kind="RevokeHsm"),
    "body too large": lambda w: envelope(w, body=bytes(49 * 1024)),
}


@pytest.mark.parametrize("name", ENVELOPES)
def test_what_is_no_transaction_is_malformed(world, name):
    assert code_of(world, ENVELOPES[name](world)) == "ledger.transaction_malformed"


def test_what_is_a_transaction_and_may_not_stand_is_refused_by_its_rule(world):
    """verifies that: other ledgers, times, kinds and signatures, each with its code."""
    height = world.consortium.state.height
    last = 1000
    cases = [
        ("ledger.other_ledger", envelope(world, ledger_id=bytes(32))),
        ("ledger.expired", envelope(world, valid_until=height)),
        ("ledger.valid_too_long", envelope(world, valid_until=height + 2 + last)),
        ("ledger.kind_unknown", envelope(world, kind="Approve")),
        ("ledger.kind_unknown", envelope(world, kind="registerPlatform")),
        ("ledger.provider_unknown", envelope(world, sender={"kind": "provider", "name": ""})),
        ("ledger.provider_unknown", envelope(world, sender={"kind": "provider", "name": "Alpha"})),
        ("ledger.provider_unknown", envelope(world, sender={"kind": "provider", "name": "\N{CYRILLIC SMALL LETTER A}lpha"})),
        ("ledger.provider_unknown", envelope(world, sender={"kind": "provider", "name": "../provider/alpha"})),
        ("ledger.hsm_unknown", envelope(world, sender={"kind": "hsm", "name": "alpha"})),
        ("ledger.hsm_unknown", envelope(world, sender={"kind": "hsm", "name": "alpha/../hsm-1"})),
        ("ledger.signature_invalid", flipped(good(world), -1)),
        ("ledger.signature_invalid", flipped(good(world), -60)),
        ("ledger.key_unknown", world.signed("imposter", PLATFORM_2)),
    ]
    for code, data in cases:
        assert code_of(world, data) == code


def flipped(data, at):
    changed = bytearray(data)
    changed[at] ^= 1
    return bytes(changed)


def test_a_signature_for_something_else_is_none_for_a_transaction(world):
    """verifies that: what a provider's key signed for another purpose, or with certificates along, is no transaction."""
    sender = world.senders["alpha"]
    payload = transactions.parse(good(world)).sign1.payload
    ticket = cose.sign("launcher-ticket", payload, sender.signer)
    chained = cose.sign(transactions.PURPOSE, payload, sender.signer, x5chain=(world.providers["alpha"].der,))
    huge = cose.sign(transactions.PURPOSE, payload, sender.signer, x5chain=(world.providers["alpha"].der,) * 8)
    for data in (ticket, chained, huge):
        assert code_of(world, data) == "ledger.transaction_malformed"


def test_order_and_repetition_in_one_block_are_judged_in_order(world):
    """verifies that: what needs an earlier transaction fails before it and passes after it; a duplicate counts once."""
    register, end = world.signed("alpha", PLATFORM_2), world.signed("alpha", tx.RevokePlatform(id="h2"))
    found = world.consortium.state
    wrong = state.execute(found, [end, register, register], time_ms=world.consortium.now_ms + 1000).outcomes
    assert [getattr(one, "code", "applied") for one in wrong] == ["ledger.record_unknown", "applied", "ledger.nonce_used"]
    right = state.execute(found, [register, end], time_ms=world.consortium.now_ms + 1000).outcomes
    assert all(isinstance(one, Applied) for one in right)
    # The same payload signed twice has two signatures (ECDSA) and one nonce.
    payload = transactions.parse(register).payload
    again = transactions.sign(payload, world.senders["alpha"].signer)
    assert again != register
    both = state.execute(found, [register, again], time_ms=world.consortium.now_ms + 1000).outcomes
    assert [getattr(one, "code", "applied") for one in both] == ["applied", "ledger.nonce_used"]


@settings(max_examples=300, deadline=None)
@given(data=st.binary(max_size=200))
@example(data=b"\xd2\x84\x40\xa0\x40\x40")
def test_any_bytes_are_answered(world, data):
    assert code_of(world, data) is not None


@settings(max_examples=200, deadline=None)
@given(at=st.integers(0, 10_000), bit=st.integers(0, 7))
def test_no_bit_of_a_transaction_can_be_changed(world, at, bit):
    """verifies that: whatever bit is flipped, nothing applies."""
    changed = bytearray(GOOD.setdefault("data", good(world)))
    changed[at % len(changed)] ^= 1 << bit
    assert code_of(world, bytes(changed)) is not None


GOOD = {}


# Certificates ------------------------------------------------------------------------------------------------------------


def certificate(world, **changes):
    """An issuing CA's certificate as RegisterIssuingCa wants it, with these changes."""
    issuer = world.providers["alpha"].ca
    key = changes.get("key") or ec.generate_private_key(ec.SECP256R1())
    builder = (
        x509.CertificateBuilder()
        .subject_name(changes.get("subject", x509.Name([])))
        .issuer_name(changes.get("issuer_name", issuer.certificate.subject))
        .public_key(key.public_key())
        .serial_number(changes.get("serial", 9))
        .not_valid_before(to_datetime(Instant(changes.get("not_before", NOW - 60))))
        .not_valid_after(to_datetime(Instant(changes.get("not_after", NOW + 86400))))
    )
    if changes.get("basic", True):
        constraints = x509.BasicConstraints(ca=changes.get("ca", True), path_length=changes.get("path_length", 0))
        builder = builder.add_extension(constraints, critical=changes.get("critical", True))
    if changes.get("usage", True):
        builder = builder.add_extension(certificates._usage(ca=changes.get("ca", True)), critical=True)
    if "extension" in changes:
        builder = builder.add_extension(changes["extension"], critical=changes.get("extension_critical", True))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = builder.sign(changes.get("signer", issuer.key), changes.get("hash", hashes.SHA256()))
        return made.public_bytes(Encoding.DER)


def content(der):
    """The content of the SEQUENCE that `der` begins with."""
    if der[1] < 128:
        return der[2 : 2 + der[1]]
    size = der[1] - 128
    return der[2 + size : 2 + size + int.from_bytes(der[2 : 2 + size], "big")]


ECDSA_SHA256 = bytes.fromhex("300a06082a8648ce3d040302")
ECDSA_SHA1 = bytes.fromhex("300906072a8648ce3d0401")


def made_odd(world, *, before, after, algorithm=ECDSA_SHA256, digest=None):
    """A certificate in which something was encoded otherwise before the issuer signed it."""
    original = content(content(certificate(world, serial=0x4142434445464748)))
    tbs = sequence(original.replace(before, after, 1))
    signature = world.providers["alpha"].ca.key.sign(tbs, ec.ECDSA(digest or hashes.SHA256()))
    return sequence(tbs + algorithm + bits(signature))


def with_serial(world, encoded):
    return made_odd(world, before=b"\x02\x08ABCDEFGH", after=encoded)


STRANGE = x509.UnrecognizedExtension(x509.ObjectIdentifier("1.3.6.1.4.1.99999.1"), b"\x05\x00")


def registered_ca(world):
    from moorline.ledger import records

    key = records.issuing_ca_key("alpha", "ca-1")
    return records.parse(records.IssuingCaRecord, world.consortium.state.get(key)).certificate


CERTIFICATES = {
    "nothing": ("ledger.certificate_malformed", lambda w: b""),
    "not DER": ("ledger.certificate_malformed", lambda w: b"certificate"),
    "PEM": ("ledger.certificate_malformed", lambda w: w.providers["alpha"].ca.certificate.public_bytes(Encoding.PEM)),
    "cut short": ("ledger.certificate_malformed", lambda w: certificate(w)[:-1]),
    "a byte more": ("ledger.certificate_malformed", lambda w: certificate(w) + b"\x00"),
    "two of them": ("ledger.certificate_malformed", lambda w: certificate(w) * 2),
    "BER, indefinite": ("ledger.certificate_malformed", lambda w: b"\x30\x80" + content(certificate(w)) + b"\x00\x00"),
    "length not minimal": (
        "ledger.certificate_malformed",
        lambda w: b"\x30\x83\x00" + certificate(w)[2:],
    ),
    "too large": ("ledger.transaction_malformed", lambda w: certificate(w) + bytes(21 * 1024)),
    "large name": ("ledger.certificate_malformed", lambda w: sequence(b"\x30" * 100)),
    "serial zero": ("ledger.certificate_serial", lambda w: with_serial(w, b"\x02\x01\x00")),
    "serial negative": ("ledger.certificate_serial", lambda w: with_serial(w, b"\x02\x01\x80")),
    "serial not minimal": ("ledger.certificate_malformed", lambda w: with_serial(w, b"\x02\x02\x00\x05")),
    "serial empty": ("ledger.certificate_malformed", lambda w: with_serial(w, b"\x02\x00")),
    "serial of 21 octets": ("ledger.certificate_serial", lambda w: with_serial(w, b"\x02\x15" + b"\x01" * 21)),
    "expired": ("ledger.certificate_validity", lambda w: certificate(w, not_after=NOW)),
    "not yet valid": ("ledger.certificate_validity", lambda w: certificate(w, not_before=NOW + 80000)),
    "another issuer's name": ("ledger.certificate_issuer", lambda w: certificate(w, issuer_name=x509.Name([]))),
    "another issuer's key": (
        "ledger.certificate_issuer",
        lambda w: certificate(w, signer=ec.generate_private_key(ec.SECP256R1())),
    ),
    "signature flipped": ("ledger.certificate_issuer", lambda w: flipped(certificate(w), -1)),
    "no CA": ("ledger.certificate_profile", lambda w: certificate(w, ca=False, path_length=None)),
    "path length 1": ("ledger.certificate_profile", lambda w: certificate(w, path_length=1)),
    "no path length": ("ledger.certificate_profile", lambda w: certificate(w, path_length=None)),
    "not critical": ("ledger.certificate_profile", lambda w: certificate(w, critical=False)),
    "no basic constraints": ("ledger.certificate_profile", lambda w: certificate(w, basic=False)),
    "no key usage": ("ledger.certificate_profile", lambda w: certificate(w, usage=False)),
    "critical and strange": ("ledger.certificate_extension", lambda w: certificate(w, extension=STRANGE)),
    "SHA-512": ("ledger.certificate_algorithm", lambda w: certificate(w, hash=hashes.SHA512())),
    "RSA key": (
        "ledger.certificate_malformed",
        lambda w: certificate(w, key=rsa.generate_private_key(public_exponent=65537, key_size=2048)),
    ),
    "P-521 key": ("ledger.certificate_malformed", lambda w: certificate(w, key=ec.generate_private_key(ec.SECP521R1()))),
    "the provider's own": ("ledger.certificate_profile", lambda w: w.providers["alpha"].der),
    "a key that is in use": ("ledger.key_taken", registered_ca),
}


@pytest.mark.parametrize("name", CERTIFICATES)
def test_a_certificate_that_is_odd_is_refused(world, name):
    code, made = CERTIFICATES[name]
    assert tried(world, tx.RegisterIssuingCa(id="ca-2", certificate=made(world))) == code


def test_a_good_certificate_passes(world):
    """verifies that: the helper above makes certificates that are taken, strange extensions included if not critical."""
    for made in (certificate(world), certificate(world, extension=STRANGE, extension_critical=False)):
        assert tried(world, tx.RegisterIssuingCa(id="ca-2", certificate=made)) is None
    assert tried(world, tx.RegisterIssuingCa(id="ca-2", certificate=with_serial(world, b"\x02\x01\x05"))) is None


def test_a_sha1_signature_counts_for_nothing(world):
    """verifies that: a certificate signed with ECDSA over SHA-1 by the right key is refused for its algorithm."""
    made = made_odd(world, before=ECDSA_SHA256, after=ECDSA_SHA1, algorithm=ECDSA_SHA1, digest=hashes.SHA1())
    assert tried(world, tx.RegisterIssuingCa(id="ca-2", certificate=made)) == "ledger.certificate_algorithm"


# Names -------------------------------------------------------------------------------------------------------------------


def hsm_named(world, *names):
    """An HSM registration whose certificate has these subject alternative names."""
    issuer = world.providers["alpha"].ca
    key = ec.generate_private_key(ec.SECP256R1())
    access = x509.AccessDescription(certificates._CA_REPOSITORY, x509.UniformResourceIdentifier("https://127.0.0.1:1"))
    builder = (
        certificates._ca(
            x509.Name([]), key.public_key(), issuer.certificate.subject,
            certificates.Validity(not_before=Instant(NOW - 60), not_after=Instant(NOW + 86400)), 7, path_length=0,
        )
        .add_extension(x509.SubjectInformationAccess([access]), critical=False)
    )  # fmt: skip
    if names:
        builder = builder.add_extension(x509.SubjectAlternativeName(list(names)), critical=False)
    made = certificates._signed(builder, issuer)
    return tx.RegisterHsm(
        id="hsm-2",
        certificate=made.public_bytes(Encoding.DER),
        address="127.0.0.1:1",
        est_url="https://127.0.0.1:1/.well-known/est",
        kem_public=b"k" * 65,
        signing_public=spki(),
        bundle_sequence=1,
    )


URI = x509.UniformResourceIdentifier
DNS = x509.DNSName
ID = "spiffe://alpha.test/hsm/hsm-2"
NAME = DNS("hsm-2.hsm.alpha.test")
TRICKS = [
    (),
    (NAME,),
    (URI(ID),),
    (URI(ID), NAME, URI(ID)),
    (URI(ID), NAME, URI("spiffe://beta.test/hsm/hsm-2")),
    (URI("spiffe://beta.test/hsm/hsm-2"), NAME, URI(ID)),
    (URI(ID), NAME, DNS("*.alpha.test")),
    (URI(ID), DNS("*.hsm.alpha.test")),
    (URI("spiffe://*.test/hsm/hsm-2"), NAME),
    (URI("SPIFFE://alpha.test/hsm/hsm-2"), NAME),
    (URI("spiffe://ALPHA.test/hsm/hsm-2"), NAME),
    (URI("spiffe://alpha.test./hsm/hsm-2"), NAME),
    (URI("spiffe://alpha.test:443/hsm/hsm-2"), NAME),
    (URI("spiffe://user@alpha.test/hsm/hsm-2"), NAME),
    (URI("spiffe://alpha.test/hsm/hsm-2?x=1"), NAME),
    (URI("spiffe://alpha.test/hsm/hsm-2#x"), NAME),
    (URI("spiffe://alpha.test/hsm/hsm-2/"), NAME),
    (URI("spiffe://alpha.test//hsm/hsm-2"), NAME),
    (URI("spiffe://alpha.test/hsm/../hsm/hsm-2"), NAME),
    (URI("spiffe://alpha.test/hsm/hsm%2D2"), NAME),
    (URI("spiffe://alpha.test/hsm/hsm-2\0.beta"), NAME),
    (URI("spiffe://alpha.test/HSM/hsm-2"), NAME),
    (URI("spiffe://alpha.test/device/hsm-2"), NAME),
    (URI("spiffe://xn--lpha-93d.test/hsm/hsm-2"), NAME),
    (URI("https://alpha.test/hsm/hsm-2"), NAME),
    (URI(""), NAME),
]


@pytest.mark.parametrize(
    "names", TRICKS, ids=lambda names: ", ".join(one.value for one in names).replace("\0", "NUL") or "none"
)
def test_an_hsm_has_one_name_and_it_is_exact(world, names):
    assert tried(world, hsm_named(world, *names)) == "ledger.certificate_name"


def test_the_exact_name_passes(world):
    assert tried(world, hsm_named(world, URI(ID), NAME)) is None


@pytest.mark.parametrize(
    "domain",
    [
        "", ".", "Zeta.test", "zeta.test.", ".zeta.test", "zeta..test", "*.zeta.test", "zeta.test:443", "user@zeta.test",
        "zeta.test/x", "zeta.test\0", "zeta.test\n", " zeta.test", "z\N{LATIN SMALL LETTER E WITH ACUTE}ta.test",
        "xn--zta-bma.test",
        "\N{CYRILLIC SMALL LETTER A}lpha.test", "-zeta.test", "zeta-.test", "10.0.0.1", "zeta.1",
        "a" * 64 + ".test", ("a" * 60 + ".") * 5 + "test",
    ],
)  # fmt: skip
def test_a_trust_domain_is_what_it_looks_like(world, domain):
    """verifies that: case, dots, wildcards, ports, users, NUL, other alphabets and encoded labels are no trust domain."""
    action = replace(world.provider_body(), trust_domain=domain)
    assert tried(world, transactions.propose(action), "authority-1") == "ledger.name_malformed"


NAMES = ["", "Voice", "voice ", "vo/ice", "../alpha", "vo\0ice", "vo\nice", "-voice", "voice-",
         "v\N{LATIN SMALL LETTER O WITH DIAERESIS}ice",
         "voice.", "a" * 64, "vo_ice", "\N{FULLWIDTH LATIN SMALL LETTER V}oice", "voi\N{ZERO WIDTH SPACE}ce"]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_names_of_records_are_plain(world, name):
    """verifies that: whatever is named, its name is lower-case ASCII: no key can look like another or lie elsewhere."""
    alpha = [
        replace(SERVICE, name=name),
        replace(PLATFORM_2, id=name),
        replace(SERVICE, name="voice", callers=(name,)),
        replace(SERVICE, name="voice", profiles=(name,)),
        tx.RegisterIssuingCa(id=name, certificate=certificate(world)),
        tx.RegisterOrchestrator(id=name, public_key=spki()),
        tx.RegisterReferenceValues(id=name, kind="tpm", digest=bytes(32)),
        tx.AnchorLog(log=name, size=1, root=bytes(32)),
        replace(world.offer("c-9"), contract=name),
        replace(world.offer("c-9"), profiles=(name,)),
    ]
    if len(name) != 64:  # ids of revocations may be digests
        alpha.append(tx.Revoke(kind=RevocationKind.DEVICE, id=name))
    for body in alpha:
        assert tried(world, body) == "ledger.name_malformed", body


@pytest.mark.parametrize(
    "address",
    ["", "127.0.0.1", ":1", "127.0.0.1:", "127.0.0.1:0", "127.0.0.1:65536", "127.0.0.1:\N{ARABIC-INDIC DIGIT ONE}",
     "user@host:1", "ho st:1", "host\0:1", "[::1]", "::1:1", "host:1:2",
     "h\N{LATIN SMALL LETTER O WITH DIAERESIS}st:1"],
)  # fmt: skip
def test_addresses_are_host_and_port(world, address):
    good_hsm = hsm_named(world, URI(ID), NAME)
    assert tried(world, replace(good_hsm, address=address)) == "ledger.address_malformed"
    assert tried(world, replace(good_hsm, est_url=f"https://{address}/est")) == "ledger.address_malformed"
    for action in world.actions():
        if isinstance(action, tx.AdmitAuthority | tx.RotateAuthorityKey):
            proposal = transactions.propose(replace(action, address=address))
            assert tried(world, proposal, "authority-1") == "ledger.address_malformed"


def test_texts_say_what_they_seem_to_say(world):
    odd = "EU/DE\N{RIGHT-TO-LEFT OVERRIDE}"
    for body in (
        replace(PLATFORM_2, location=odd),
        replace(PLATFORM_2, product="a\0b"),
        replace(SERVICE, name="v", use_case=odd),
    ):
        assert tried(world, body) == "ledger.text_malformed"
    assert tried(world, tx.RegisterReferenceValues(id="r", kind="t\npm", digest=bytes(32))) == "ledger.text_malformed"


def test_limits_hold(world):
    """verifies that: packages of a service, length of conditions and open proposals have limits, and at the limit pass."""
    service = replace(SERVICE, name="voice", packages=tuple(map(package, range(100))))
    assert tried(world, service) is None
    assert tried(world, replace(service, packages=tuple(map(package, range(101))))) == "ledger.too_many_packages"
    offer = world.offer("c-9")
    assert tried(world, replace(offer, conditions=offer.conditions + " " * 9000)) == "conditions.too_large"
    assert tried(world, replace(offer, conditions="permit(")) == "conditions.malformed"
    assert tried(world, replace(offer, conditions="permit(principal, action, resource) when { 1 };")) == "conditions.type"


def test_a_public_key_is_a_key_in_its_one_encoding(world):
    key = ec.generate_private_key(ec.SECP256R1()).public_key()
    point = key.public_bytes(Encoding.X962, PublicFormat.CompressedPoint)
    compressed = bytes.fromhex("3039301306072a8648ce3d020106082a8648ce3d030107032200") + point
    rsa_key = rsa.generate_private_key(public_exponent=65537, key_size=2048).public_key()
    for bad in (b"", b"key", compressed, keys.public_bytes(key)[:-1], keys.public_bytes(key) + b"\0"):
        assert tried(world, tx.RegisterOrchestrator(id="o-9", public_key=bad)) == "ledger.key_malformed"
    large = tried(world, tx.RegisterOrchestrator(id="o-9", public_key=keys.public_bytes(rsa_key)))
    assert large == "ledger.transaction_malformed"  # longer than any key used here
