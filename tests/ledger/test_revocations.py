"""Revocations have numbers: how many there are, which is the n-th, and a digest over them in order."""

from dataclasses import replace

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from moorline.ledger import genesis, proof, records, state, transactions
from moorline.ledger.records import IndexRecord, RevocationKind, RevocationsRecord
from moorline.ledger.revocation_list import NONE, digest_after
from moorline.ledger.state import Applied, Rejected
from moorline.ledger.transactions import Revoke, RevokeGlobally, SenderKind
from moorline.wire import keys

from .conftest import NAMES, hsm_body

QUORUM = NAMES[:3]
DEVICE, CERTIFICATE = RevocationKind.DEVICE, RevocationKind.CERTIFICATE


def counted(found, registrant):
    return records.parse(RevocationsRecord, found.get(records.revocations_index_key(registrant)))


def listed(found, registrant):
    """The keys under the numbers 1 to n, in order; n+1 holds nothing."""
    count = counted(found, registrant).count
    assert found.get(records.numbered_revocation_index_key(registrant, count + 1)) is None
    values = (found.get(records.numbered_revocation_index_key(registrant, number + 1)) for number in range(count))
    return [records.parse(IndexRecord, value).holders[0] for value in values]


def older(consortium):
    """The same consortium with a genesis of before revocations had numbers."""
    consortium.made = replace(consortium.made, genesis=replace(consortium.made.genesis, version=1))
    consortium.state = state.initial(genesis.parse(consortium.made.genesis.encode()))
    return consortium


def test_revocations_are_numbered_under_their_registrant(consortium, alpha, beta):
    """verifies that: each registrant counts for itself from 1 in the ledger's order, of which the digest is."""
    for provider, kind, name in [
        (alpha, DEVICE, "d-2"),
        (beta, DEVICE, "d-1"),
        (alpha, CERTIFICATE, "ff"),
        (alpha, DEVICE, "d-1"),
    ]:
        assert isinstance(consortium.as_provider(provider, Revoke(kind=kind, id=name)), Applied)
    chip = RevokeGlobally(kind=RevocationKind.CHIP, id="ab")
    assert isinstance(consortium.decide(chip, QUORUM), Applied)
    found = consortium.state
    order = ["revocation/device/alpha/d-2", "revocation/certificate/alpha/ff", "revocation/device/alpha/d-1"]
    assert listed(found, "alpha") == order
    assert listed(found, "beta") == ["revocation/device/beta/d-1"]
    assert listed(found, "consortium") == ["revocation/chip/consortium/ab"]
    assert counted(found, "alpha") == RevocationsRecord(count=3, digest=digest_after(bytes(32), order))
    assert counted(found, "alpha").digest != digest_after(bytes(32), [order[1], order[0], order[2]])


def test_what_an_hsm_revokes_counts_as_its_providers(consortium, alpha):
    key = ec.generate_private_key(ec.SECP256R1())
    assert isinstance(consortium.as_provider(alpha, hsm_body(alpha, key=key)), Applied)
    assert isinstance(consortium.as_provider(alpha, Revoke(kind=DEVICE, id="d-2")), Applied)
    payload = consortium.payload(SenderKind.HSM, "alpha/hsm-1", Revoke(kind=DEVICE, id="d-1"))
    assert isinstance(consortium.send(payload, keys.KeySigner(key)), Applied)
    assert listed(consortium.state, "alpha") == ["revocation/device/alpha/d-2", "revocation/device/alpha/d-1"]


def test_a_refused_revocation_takes_no_number(consortium, alpha):
    """verifies that: twice, of a wrong kind, malformed, or in a proposal that is only tried out: count and digest stay."""
    assert counted(consortium.state, "alpha") == NONE
    assert isinstance(consortium.as_provider(alpha, Revoke(kind=DEVICE, id="d-1")), Applied)
    before = counted(consortium.state, "alpha"), counted(consortium.state, "consortium")
    for kind, name in [(DEVICE, "d-1"), (RevocationKind.VENDOR_ROOT, "ab"), (DEVICE, "../x")]:
        assert isinstance(consortium.as_provider(alpha, Revoke(kind=kind, id=name)), Rejected)
    propose = transactions.propose(RevokeGlobally(kind=RevocationKind.CHIP, id="ab"))
    assert isinstance(consortium.as_authority("authority-1", propose), Applied)
    assert (counted(consortium.state, "alpha"), counted(consortium.state, "consortium")) == before


def test_several_in_one_block_have_numbers_in_their_order(consortium, alpha):
    batch = []
    for name in ("d-3", "d-1", "d-2", "d-1"):
        payload = consortium.payload(SenderKind.PROVIDER, "alpha", Revoke(kind=DEVICE, id=name))
        batch.append(transactions.sign(payload, keys.KeySigner(alpha.ca.key)))
    outcomes = consortium.block(*batch)
    assert [type(one) for one in outcomes] == [Applied, Applied, Applied, Rejected]
    assert [key[-3:] for key in listed(consortium.state, "alpha")] == ["d-3", "d-1", "d-2"]


def test_a_ledger_of_before_goes_on_as_it_was(consortium):
    """verifies that: from a genesis of version 1 the same transactions give the states they always gave, without numbers."""
    alpha = older(consortium).admitted("alpha", "alpha.test")
    outcome = consortium.as_provider(alpha, Revoke(kind=DEVICE, id="d-1"))
    assert isinstance(outcome, Applied)
    assert list(outcome.writes) == ["revocation/device/alpha/d-1"]
    assert isinstance(consortium.decide(RevokeGlobally(kind=RevocationKind.CHIP, id="ab"), QUORUM), Applied)
    assert [key for key in consortium.state.records if key.startswith("index/revocation")] == []


def test_one_proof_shows_the_count_and_a_page_of_numbers(consortium, alpha):
    """verifies that: sixty-three numbers and the count are one bundle, within its bounds, among ten thousand others."""
    names = [f"{number:x}" * 8 for number in range(1, 64)]
    batch = [
        transactions.sign(
            consortium.payload(SenderKind.PROVIDER, "alpha", Revoke(kind=CERTIFICATE, id=name)), keys.KeySigner(alpha.ca.key)
        )
        for name in names
    ]
    assert all(isinstance(one, Applied) for one in consortium.block(*batch))
    others = {records.numbered_revocation_index_key("beta", number): b"\xa0" for number in range(10_000)}
    tree = consortium.state.tree.updated(others)
    numbers = [records.numbered_revocation_index_key("alpha", number) for number in range(1, 64)]
    bundle = proof.make_bundle(
        note=b"n" * 600, changes=(), tree=tree, value_of=tree.value, keys=(records.revocations_index_key("alpha"), *numbers)
    )
    assert len(proof.parse_bundle(bundle).records) == 64


@pytest.mark.parametrize("digest", [bytes(32), b"\x01" * 32])
def test_a_digest_is_of_each_key_in_its_place(digest):
    """verifies that: a list that lacks one, has one more, or has two changed about has another digest."""
    order = ["revocation/device/alpha/a", "revocation/device/alpha/b", "revocation/device/alpha/c"]
    whole = digest_after(digest, order)
    assert digest_after(digest_after(digest, order[:1]), order[1:]) == whole
    wrong = [
        order[:2],
        order[1:],
        [*order, order[0]],
        [order[1], order[0], order[2]],
        ["revocation/device/alpha/ab", order[2]],
    ]
    assert whole not in [digest_after(digest, one) for one in wrong]
