"""A proof in a ledger with many members: it stays small, since it shows one path of a tree."""

from dataclasses import replace

import pytest

from moorline.ledger import records, transactions
from moorline.ledger.records import RevocationKind

from .conftest import consortium_at
from .test_light_client import bundle_of, verified

PROVIDERS, REVOCATIONS, MOST = 10_000, 1_000_000, 4096


@pytest.mark.long
def test_a_proof_of_one_key_is_within_four_kibibytes_among_ten_thousand_providers_and_a_million_revocations(tmp_path):
    """verifies that: present or absent, provider or revocation, the bundle with its quorum is as small, and verifies."""
    made = consortium_at(tmp_path / "consortium")
    alpha = made.admitted("alpha", "alpha.test")
    made.as_provider(alpha, transactions.Revoke(kind=RevocationKind.DEVICE, id="phone-1"))
    record = made.state.get(records.provider_key("alpha"))
    others = {records.provider_key(f"other-{number}"): record for number in range(PROVIDERS)}
    key = records.revocation_key(RevocationKind.DEVICE, "alpha", "phone-1")
    revoked = {key.replace("phone-1", f"phone-{number}"): made.state.get(key) for number in range(1, REVOCATIONS)}
    made.state = replace(made.state, tree=made.state.tree.updated({**others, **revoked}))
    assert len(made.state.tree) > PROVIDERS + REVOCATIONS
    absent = [records.provider_key("none"), key.replace("phone-1", "tablet-1")]
    for wanted in (records.provider_key("alpha"), records.provider_key("other-9999"), key, *absent):
        bundle = bundle_of(made, [wanted])
        assert len(bundle) <= MOST, (wanted, len(bundle))
        proven = verified(made, bundle)
        if wanted in absent:
            proven.absent(wanted)
        else:
            assert proven.record(wanted) == made.state.get(wanted)
