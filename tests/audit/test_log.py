"""The secure log: what was written cannot be changed, cut or replaced without notice, and the entry is named."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moorline.audit import log, merkle
from moorline.clock import Instant
from moorline.errors import Malformed, NotAuthentic

DOMAIN = "broker"
COUNT = 6


def written(count=COUNT, domain=DOMAIN, word="issued"):
    """A log, its entries, and the checkpoint after each entry."""
    chain, entries, checkpoints = log.SecureLog(domain=domain), [], []
    for number in range(count):
        chain, data = chain.appended(
            time=Instant(1_790_000_000 + number), event=word, subject=f"instance-{number}", details={"service": "records"}
        )
        entries.append(data)
        checkpoints.append(chain.checkpoint())
    return chain, entries, checkpoints


def refusal(entries, checkpoints, domain=DOMAIN):
    with pytest.raises(NotAuthentic) as caught:
        log.verify(entries, domain=domain, checkpoints=checkpoints, name="broker/hsm-1")
    return caught.value


def rechained(entries, number, word):
    """Entry `number` changed, and every later one made to follow from it: what a writer of the database can do."""
    head, result = log.first_head(DOMAIN), []
    for at, data in enumerate(entries):
        entry = log.parse_entry(data)
        event = word if at == number else entry.event
        again = log.encode_entry(
            number=at, previous=head, time=entry.time, event=event, subject=entry.subject, details=entry.details
        )
        head = log.entry_digest(again)
        result.append(again)
    return result


def test_a_log_verifies_and_goes_on():
    chain, entries, checkpoints = written()
    assert log.verify(entries, domain=DOMAIN, checkpoints=checkpoints) == chain.checkpoint()
    more, data = chain.appended(time=Instant(1), event="revoked", subject="x", details={"b": "1", "aa": "2", "a": "3"})
    assert log.verify([*entries, data], domain=DOMAIN, checkpoints=checkpoints[-1:]) == more.checkpoint()
    assert list(log.parse_entry(data).details) == ["a", "b", "aa"]
    assert log.verify([], domain=DOMAIN).head == log.first_head(DOMAIN)


@pytest.mark.parametrize("number", range(COUNT))
@pytest.mark.parametrize(("old", "new"), [(b"issued", b"denied"), (b"instance", b"Instance"), (b"time", b"timf")])
def test_a_changed_entry_is_found_and_named(number, old, new):
    """verifies that: a naive change is named; at the very end if a checkpoint was signed one entry before."""
    _, entries, checkpoints = written()
    changed = [*entries[:number], entries[number].replace(old, new), *entries[number + 1 :]]
    error = refusal(changed, checkpoints[-2:])
    assert (error.code, error.says) == ("audit.entry_changed", f"entry {number} of broker/hsm-1 was changed")


@pytest.mark.parametrize("number", range(COUNT))
def test_a_changed_link_is_named_too(number):
    """verifies that: an entry whose `previous` was changed is named, not the one before it."""
    _, entries, checkpoints = written()
    changed = [*entries]
    changed[number] = entries[number][:-1] + bytes([entries[number][-1] ^ 1])
    error = refusal(changed, checkpoints[-1:])
    assert (error.code, error.says) == ("audit.entry_changed", f"entry {number} of broker/hsm-1 was changed")


@pytest.mark.parametrize("number", range(COUNT))
def test_a_removed_entry_is_named(number):
    _, entries, checkpoints = written()
    error = refusal([*entries[:number], *entries[number + 1 :]], checkpoints[-1:])
    if number == COUNT - 1:
        assert (error.code, error.got) == ("audit.truncated", "5")
    else:
        assert (error.code, error.says) == ("audit.entry_removed", f"entry {number} of broker/hsm-1 is missing")


def test_several_removed_entries_are_named():
    _, entries, checkpoints = written()
    error = refusal([entries[0], *entries[3:]], checkpoints[-1:])
    assert (error.code, error.says) == ("audit.entry_removed", "entries 1 to 2 of broker/hsm-1 are missing")


def test_reordered_repeated_and_foreign_entries_are_named():
    _, entries, checkpoints = written()
    swapped = [entries[0], entries[2], entries[1], *entries[3:]]
    assert refusal(swapped, checkpoints[-1:]).code == "audit.entry_reordered"
    twice = [*entries[:3], entries[2], *entries[3:]]
    assert refusal(twice, checkpoints[-1:]).code == "audit.entry_added"
    _, foreign, _ = written(domain="verifier")
    assert refusal(foreign, checkpoints[-1:]).code == "audit.log_rewritten"


@pytest.mark.parametrize("number", range(COUNT))
def test_a_rewritten_chain_is_found_since_the_checkpoint_before(number):
    """verifies that: whoever chains a changed log anew is caught by what was signed, and the range is named."""
    _, entries, checkpoints = written()
    forged = rechained(entries, number, "denied")
    error = refusal(forged, [checkpoints[2], checkpoints[5]])
    assert error.code == "audit.log_rewritten"
    assert ("from 0 to 2" in error.says) == (number <= 2)
    assert ("from 3 to 5" in error.says) == (number > 2)
    assert log.verify(forged, domain=DOMAIN).size == COUNT  # nothing but a checkpoint shows it


@given(st.binary(max_size=200))
def test_any_bytes_are_an_entry_or_malformed(data):
    with pytest.raises(NotAuthentic):
        log.verify([data], domain=DOMAIN)
    with pytest.raises(Malformed):
        log.parse_entry(data)


@given(st.integers(0, COUNT - 1), st.data())
def test_a_flipped_bit_is_never_accepted_and_is_always_laid_to_its_entry(number, data):
    _, entries, checkpoints = written()
    bit = data.draw(st.integers(0, len(entries[number]) * 8 - 1))
    changed = bytearray(entries[number])
    changed[bit // 8] ^= 1 << bit % 8
    error = refusal([*entries[:number], bytes(changed), *entries[number + 1 :]], checkpoints[-2:])
    assert (error.code, error.says) == ("audit.entry_changed", f"entry {number} of broker/hsm-1 was changed")


_TEXTS = st.text(max_size=12)


@given(st.dictionaries(_TEXTS, _TEXTS, max_size=4), _TEXTS, _TEXTS, st.integers(0, (1 << 64) - 1))
def test_whatever_was_appended_reads_as_it_was_and_verifies(details, event, subject, time):
    """verifies that: the fast reader of `verify` and the strict one of `parse_entry` agree on every entry."""
    _, data = log.SecureLog(domain=DOMAIN).appended(time=Instant(time), event=event, subject=subject, details=details)
    entry = log.parse_entry(data)
    assert (entry.details, entry.event, entry.subject, entry.time) == (details, event, subject, time)
    assert log.verify([data], domain=DOMAIN).size == 1


def test_an_entry_nobody_could_read_is_not_written():
    chain = log.SecureLog(domain=DOMAIN)
    for event, details in (("x" * 129, {}), ("x", {"a": "y" * log.MAX_ENTRY_BYTES})):
        with pytest.raises(Malformed, match="entry_malformed"):
            chain.appended(time=Instant(1), event=event, subject="", details=details)


def test_growing_in_place_gives_the_same_roots():
    leaves, growing = log.leaves_of([bytes([n]) for n in range(70)]), merkle.Growing()
    frontier = merkle.Frontier()
    for leaf in leaves:
        growing.append(leaf)
        frontier = frontier.appended(leaf)
        assert growing.root() == frontier.root()
    assert growing.frontier().size == 70
