"""Hosts that are judged alike, and tokens put together from texts: both come to what the long way comes to, or to another
verdict where anything differs."""

import dataclasses
import json
from operator import attrgetter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_policy import APPRAISAL, NOW, REFERENCE, facts

from moorline.clock import Instant
from moorline.policy import ear, ear_writer, host
from moorline.policy.distance import Bound, Judgement, Standing
from moorline.policy.host_alike import AlikeHosts
from moorline.rats import AR4SI_CLAIMS, AttestationResult, EvidenceRoot, Finding, Outcome, Submodule, Tier
from moorline.simulators import firmware
from moorline.wire import base64url

POLICY = host.strict_policy(REFERENCE, not_required={})
GOOD, CHANGED = facts(), facts(firmware.CHANGED_KERNEL)
OTHER_ROOT = facts(root=EvidenceRoot.VIRTUAL)
UNLISTED = host.FileStanding(
    entries=4, unlisted=1, violations=0, first_unlisted=(host.UnlistedFile(path="/x", digest=b"d"),)
)
FAR = Judgement(standing=Standing.REFUTED, bounds=(Bound(landmark="l", at_most_m=1.0, claimed_m=9000.0),))


def moved(location, **changes):
    return dataclasses.replace(location, tag=dataclasses.replace(location.tag, **changes))


CASES = {
    "as it was": {},
    "another host": {"host": "h2"},
    "another chip": {"chip_id": b"other"},
    "a file nobody listed": {"files": UNLISTED},
    "no IMA list": {"files": None},
    "no boot log": {"boot": None},
    "another boot under the same digest": {"boot": CHANGED.boot},
    "no tag": {"location": None},
    "another host's tag": {"location": moved(GOOD.location, host="h9")},
    "a tag that ended": {"location": moved(GOOD.location, not_after=NOW - 1)},
    "a tag with a point": {"location": moved(GOOD.location, geographical="50.1,8.7")},
    "a tag with a rack": {"location": moved(GOOD.location, logical="fra1/row7")},
    "a tag that is not registered": {"location": dataclasses.replace(GOOD.location, registered_digest=b"other")},
    "a place that landmarks refute": {"distance": FAR},
    "another root": {"quote": OTHER_ROOT.quote},
}


def long_way(seen, appraisal=APPRAISAL):
    return host.appraise_host(seen, POLICY, reference=REFERENCE, appraisal=appraisal)


@pytest.mark.parametrize("seen", [dataclasses.replace(GOOD, **changes) for changes in CASES.values()], ids=list(CASES))
def test_a_verdict_is_the_same_whatever_was_judged_before(seen):
    hosts = AlikeHosts(POLICY, REFERENCE)
    for changes in CASES.values():
        hosts.appraise(dataclasses.replace(GOOD, **changes), APPRAISAL)
    for _ in range(2):
        assert hosts.appraise(seen, APPRAISAL) == long_way(seen)


def test_another_time_challenge_and_rule_about_simulation_are_another_verdict():
    hosts = AlikeHosts(POLICY, REFERENCE)
    before = hosts.appraise(GOOD, APPRAISAL)
    later = dataclasses.replace(
        APPRAISAL, issued=Instant(NOW + 5), expires=Instant(NOW + 65), nonce=bytes(32), simulated_allowed=False
    )
    found = hosts.appraise(GOOD, later)
    assert found == long_way(GOOD, later)
    assert found.status is Tier.CONTRAINDICATED  # its tag has ended meanwhile
    assert before.status is Tier.AFFIRMING
    assert found.capabilities != before.capabilities


def test_many_kinds_of_verdict_are_kept_within_bounds():
    hosts = AlikeHosts(POLICY, REFERENCE)
    for number in range(1200):
        files = host.FileStanding(entries=number + 2, unlisted=0, violations=0, first_unlisted=())
        hosts.appraise(dataclasses.replace(GOOD, files=files), APPRAISAL)
    assert len(hosts._kept) <= 1024
    assert hosts.appraise(GOOD, APPRAISAL) == long_way(GOOD)


# Tokens ----------------------------------------------------------------------------------------------------------------

words = st.text(max_size=12)
vectors = st.fixed_dictionaries(dict.fromkeys(AR4SI_CLAIMS, st.sampled_from(Tier)))
some_findings = st.builds(
    Finding,
    code=words,
    outcome=st.sampled_from(Outcome),
    claim=st.sampled_from(AR4SI_CLAIMS),
    says=words,
    got=st.none() | words,
)
results = st.builds(
    AttestationResult,
    subject=words,
    verifier=words,
    issued=st.integers(0, 1 << 40),
    expires=st.integers(0, 1 << 40),
    root=st.sampled_from(EvidenceRoot),
    simulated_allowed=st.booleans(),
    vector=vectors,
    findings=st.lists(some_findings, max_size=4).map(tuple),
    policy_digest=st.binary(max_size=40),
    nonce=st.binary(max_size=40),
    bound=st.dictionaries(words, words, max_size=3),
    submodules=st.lists(
        st.builds(Submodule, name=words, vector=vectors, doubts=st.lists(words, max_size=2).map(tuple)),
        max_size=3,
        unique_by=attrgetter("name"),
    ).map(tuple),
)
WRITER = ear_writer.Writer("alpha.test")


@given(results)
def test_a_token_is_written_as_a_serialiser_writes_the_whole(result):
    message = WRITER.signing_input(result)
    body = base64url.decode(message.partition(b".")[2])
    claims = json.loads(body)
    assert body == json.dumps(claims, separators=(",", ":"), sort_keys=True).encode("ascii")
    assert set(claims["submods"]) == {result.subject, *(f"{result.subject}/{part.name}" for part in result.submodules)}
    assert ear._result(claims) == dataclasses.replace(
        result, submodules=tuple(sorted(result.submodules, key=lambda part: part.name))
    )
    assert message == WRITER.signing_input(result) == ear.signing_input(result, audience="alpha.test")


def test_what_a_writer_keeps_is_of_that_object_and_no_other():
    writer = ear_writer.Writer("alpha.test")
    for number in range(3000):  # the ids of what was forgotten come again
        vector = dict.fromkeys(AR4SI_CLAIMS, Tier.NONE) | {"hardware": Tier.AFFIRMING if number % 2 else Tier.WARNING}
        result = dataclasses.replace(long_way(GOOD), vector=vector)
        assert writer.signing_input(result) == ear.signing_input(result, audience="alpha.test")
