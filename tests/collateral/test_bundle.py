"""A bundle is what its signer made, or nothing; and the page about it is true."""

import json
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import load_pem_public_key
from hypothesis import given, settings
from hypothesis import strategies as st

from moorline.clock import Instant
from moorline.errors import Malformed, MoorlineError, NotAuthentic
from moorline.verification.anchors import AnchorSet
from moorline.verification.collateral import ItemName
from moorline.verification.collateral_judging import Anchors, Held, judge
from moorline.verification.intel_pck import configured_anchors
from moorline.wire import cose, schema
from moorline.wire.collateral_bundle import PURPOSE, Bundle, BundledItem, open_bundle, seal
from moorline.wire.keys import KeySigner, public_bytes

SPEC = Path(__file__).parents[2] / "docs" / "spec"
KEY = ed25519.Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
ITEMS = [
    BundledItem(name="snp-crl/Milan/vcek", source="https://kdsintf.amd.com/vcek/v1/Milan/crl", fetched=90, data=b"crl"),
    BundledItem(name="intel-root-crl/root", source="https://certificates.test/x", fetched=100, data=b"root"),
]
SEALED = seal(ITEMS, KeySigner(KEY), created=100)


def test_a_bundle_opens_for_who_names_its_signer():
    other = ec.generate_private_key(ec.SECP256R1()).public_key()
    bundle, key = open_bundle(SEALED, [other, KEY.public_key()])
    assert bundle.created == 100
    assert [item.name for item in bundle.items] == ["intel-root-crl/root", "snp-crl/Milan/vcek"]
    assert public_bytes(key) == public_bytes(KEY.public_key())


@pytest.mark.parametrize("signers", [[], [ed25519.Ed25519PrivateKey.from_private_bytes(bytes(32)).public_key()]])
def test_a_bundle_of_somebody_else_is_refused(signers):
    with pytest.raises(NotAuthentic, match="bundle.signer_unknown"):
        open_bundle(SEALED, signers)


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 8 * len(SEALED) - 1))
def test_flip_any_bit_and_nothing_opens(bit):
    bad = bytearray(SEALED)
    bad[bit // 8] ^= 1 << bit % 8
    with pytest.raises((Malformed, NotAuthentic)):
        open_bundle(bytes(bad), [KEY.public_key()])


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=300))
def test_any_bytes_are_refused(data):
    with pytest.raises(MoorlineError):
        open_bundle(data, [KEY.public_key()])


def test_what_was_signed_for_another_purpose_is_no_bundle():
    payload = schema.encode(Bundle(version=1, created=100, items=()))
    with pytest.raises(Malformed, match="cose.purpose"):
        open_bundle(cose.sign("reference-values", payload, KeySigner(KEY)), [KEY.public_key()])


@pytest.mark.parametrize(
    ("bundle", "code"),
    [
        (Bundle(version=2, created=100, items=()), "bundle.version"),
        (Bundle(version=1, created=100, items=tuple(ITEMS)), "bundle.order"),
        (Bundle(version=1, created=100, items=(ITEMS[0], ITEMS[0])), "bundle.order"),
        (Bundle(version=1, created=99, items=(ITEMS[1],)), "bundle.dates"),
    ],
)
def test_a_bundle_has_one_form_also_when_it_is_signed(bundle, code):
    with pytest.raises(Malformed) as malformed:
        open_bundle(cose.sign(PURPOSE, schema.encode(bundle), KeySigner(KEY)), [KEY.public_key()])
    assert malformed.value.code == code


# ---------------------------------------------------------------- docs/spec/collateral-bundle.md


def test_the_example_on_the_page_is_what_it_says():
    example = json.loads((SPEC / "examples" / "collateral-bundle.json").read_text("utf-8"))
    page = (SPEC / "collateral-bundle.md").read_text("utf-8")
    data, now = bytes.fromhex(example["bundle"]), Instant(example["now"])
    bundle, signer = open_bundle(data, [load_pem_public_key(example["signer_public_key"].encode())])
    assert f"{len(data)} bytes" in page
    assert cose.key_id(signer).hex() in page
    assert f'"created": {bundle.created}' in page
    assert data.hex()[:32] in page
    assert seal(bundle.items, KeySigner(KEY), created=bundle.created) == data
    anchors = Anchors(snp=AnchorSet(snp=()), intel=configured_anchors([example["intel_root"].encode()]), tpm=())
    by_name = {ItemName.parse(item.name): item for item in bundle.items}
    root_crl = by_name[ItemName.parse("intel-root-crl/root")].data
    for name, item in by_name.items():
        assert item.name in page
        assert item.source in page
        assert judge(name, item.data, anchors=anchors, held=Held(root_crl=root_crl), now=now).endorses in page
