"""The secure log: what was written cannot be changed, cut or replaced without notice."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moorline.audit import log, merkle
from moorline.clock import Instant
from moorline.errors import Malformed, NotAuthentic


def written(count=5, domain="alpha/hsm-1", word="issued"):
    chain, entries = log.SecureLog(domain=domain), []
    for number in range(count):
        chain, data = chain.appended(
            time=Instant(1_790_000_000 + number), event=word, subject=f"instance-{number}", details={"service": "records"}
        )
        entries.append(data)
    return chain, entries


def test_a_log_verifies_and_goes_on():
    chain, entries = written()
    again = log.verify(entries, domain="alpha/hsm-1", anchored=chain.checkpoint())
    assert again.checkpoint() == chain.checkpoint()
    more, data = again.appended(time=Instant(1), event="revoked", subject="x", details={})
    log.verify([*entries, data], domain="alpha/hsm-1", anchored=chain.checkpoint())
    assert more.size == 6


@pytest.mark.parametrize("number", range(5))
def test_a_changed_entry_is_found(number):
    """verifies that: the chain breaks at the next entry; the last one shows against the anchor; the leaf hashes name it."""
    chain, entries = written()
    changed = [*entries[:number], entries[number].replace(b"issued", b"denied"), *entries[number + 1 :]]
    with pytest.raises(NotAuthentic) as caught:
        log.verify(changed, domain="alpha/hsm-1", anchored=chain.checkpoint())
    assert caught.value.code == ("audit.rewritten" if number == 4 else "audit.chain_broken")
    assert log.changed_entry(changed, [merkle.leaf_hash(data) for data in entries]) == number


def test_a_cut_swapped_rewritten_or_foreign_log_is_refused():
    chain, entries = written()
    _, rewritten = written(word="other")
    cases = [
        ("audit.cut", entries[:4], "alpha/hsm-1"),
        ("audit.chain_broken", [entries[1], entries[0], *entries[2:]], "alpha/hsm-1"),
        ("audit.rewritten", rewritten, "alpha/hsm-1"),
        ("audit.chain_broken", entries, "alpha/hsm-2"),
    ]
    for code, bad, domain in cases:
        with pytest.raises(NotAuthentic) as caught:
            log.verify(bad, domain=domain, anchored=chain.checkpoint())
        assert caught.value.code == code
    assert log.changed_entry(entries[:4], [merkle.leaf_hash(data) for data in entries]) == 4
    assert log.changed_entry(entries, [merkle.leaf_hash(data) for data in entries]) is None


@given(st.binary(max_size=200))
def test_any_bytes_are_an_entry_or_malformed(data):
    with pytest.raises((Malformed, NotAuthentic)):
        log.verify([data], domain="alpha/hsm-1", anchored=None)


@given(st.integers(0, 4), st.data())
def test_a_flipped_bit_is_never_accepted(number, data):
    chain, entries = written()
    bit = data.draw(st.integers(0, len(entries[number]) * 8 - 1))
    changed = bytearray(entries[number])
    changed[bit // 8] ^= 1 << bit % 8
    with pytest.raises((Malformed, NotAuthentic)):
        log.verify(
            [*entries[:number], bytes(changed), *entries[number + 1 :]], domain="alpha/hsm-1", anchored=chain.checkpoint()
        )
