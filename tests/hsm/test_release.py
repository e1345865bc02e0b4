"""The release decision: what is accepted, and one refusal for each thing that can be wrong, by its own code."""

from __future__ import annotations

from dataclasses import fields as dataclass_fields
from dataclasses import replace

import pytest

from moorline.clock import Instant
from moorline.errors import Refused
from moorline.hsm.release import (
    EnclaveFacts,
    HostFacts,
    Place,
    ReleaseRequest,
    ServiceRule,
    decide,
)
from moorline.rats import AttestationResult, EvidenceRoot, Finding, Outcome, Tier
from moorline.storage.broker_epochs import Epoch, Lease
from moorline.wire import launch
from moorline.wire.launch import ChannelProfile, LaunchFields

NOW = Instant(1_800_000_000)
KEY = bytes(range(32))
DIGEST = b"c" * 32

FIELDS = LaunchFields(
    ledger_id=b"l" * 32,
    provider="alpha",
    tenant="t1",
    service="records",
    package_digest=b"p" * 32,
    configuration_digest=b"f" * 32,
    measurement=b"m" * 48,
    instance="records-1",
    generation=1,
    host="h1",
    chip=b"x" * 64,
    hsm="hsm-1",
    profile=ChannelProfile.TLS,
    launcher=b"L" * 32,
    epoch=7,
    sequence=3,
    not_after=NOW + 60,
)

RESULT = AttestationResult(
    subject="host/h1",
    verifier="verifier-1",
    issued=Instant(NOW - 5),
    expires=Instant(NOW + 60),
    root=EvidenceRoot.TEST,
    simulated_allowed=True,
    vector={"hardware": Tier.AFFIRMING},
    findings=(),
    policy_digest=b"",
    nonce=b"",
)


def request_for(fields: LaunchFields = FIELDS, **changes) -> ReleaseRequest:
    """A request in which everything holds, around these fields, with changes."""
    token = launch.token(KEY, fields)
    good = ReleaseRequest(
        place=Place(ledger_id=b"l" * 32, provider="alpha", hsm="hsm-1", simulated_allowed=True),
        fields=fields,
        profile=ChannelProfile.TLS,
        expected_token=token,
        proof=launch.token_proof(token, DIGEST),
        challenge_digest=DIGEST,
        enclave=EnclaveFacts(
            measurement=b"m" * 48, chip=b"x" * 64, commitment=launch.commitment(fields), root=EvidenceRoot.TEST
        ),
        epoch=Epoch(
            epoch=7,
            opened=Instant(NOW - 10),
            not_after=Instant(NOW + 3600),
            accept_until=Instant(NOW + 3660),
            wrapped=None,
        ),
        leases=(Lease(launcher=b"L" * 32, epoch=7, first=0, count=10, not_after=Instant(NOW + 60), void=False),),
        service=ServiceRule(packages=frozenset({(b"p" * 32, b"m" * 48)}), profiles=frozenset({"tls"})),
        host=HostFacts(result=RESULT, problem=None, gaps=(), platform_chip=b"x" * 64),
        now=NOW,
    )
    return replace(good, **changes)


GOOD = request_for()


def lease(**changes):
    return (replace(GOOD.leases[0], **changes),)


def enclave(**changes):
    return replace(GOOD.enclave, **changes)


def host(**changes):
    return replace(GOOD.host, **changes)


def result(**changes):
    return host(result=replace(RESULT, **changes))


NOT_MET = Finding(code="host.kernel", outcome=Outcome.NOT_MET, claim="executables", says="changed")

TABLE = {
    "another ledger": (request_for(replace(FIELDS, ledger_id=b"z" * 32)), "launch.other_ledger"),
    "another provider": (request_for(replace(FIELDS, provider="beta")), "launch.other_provider"),
    "another HSM": (request_for(replace(FIELDS, hsm="hsm-2")), "launch.other_hsm"),
    "HPKE-only session": (request_for(profile=ChannelProfile.HPKE_ONLY), "launch.profile_mismatch"),
    "no proof": (request_for(proof=None), "launch.token_mismatch"),
    "empty proof": (request_for(proof=b""), "launch.token_mismatch"),
    "guessed proof": (request_for(proof=b"0" * 32), "launch.token_mismatch"),
    "proof of another challenge": (request_for(challenge_digest=b"d" * 32), "launch.token_mismatch"),
    "key of the epoch gone": (request_for(expected_token=None), "launch.token_mismatch"),
    "evidence of other fields": (replace(GOOD, fields=replace(FIELDS, generation=2)), "launch.commitment_mismatch"),
    "other commitment": (request_for(enclave=enclave(commitment=b"0" * 32)), "launch.commitment_mismatch"),
    "other code": (request_for(enclave=enclave(measurement=b"n" * 48)), "launch.measurement_mismatch"),
    "other chip": (request_for(enclave=enclave(chip=b"y" * 64)), "launch.chip_mismatch"),
    "masked chip": (request_for(enclave=enclave(chip=None)), "launch.chip_mismatch"),
    "software root": (request_for(enclave=enclave(root=EvidenceRoot.SOFTWARE)), "launch.root_not_accepted"),
    "simulated in production": (
        request_for(place=replace(GOOD.place, simulated_allowed=False)),
        "launch.root_not_accepted",
    ),
    "late": (request_for(now=Instant(NOW + 61)), "launch.expired"),
    "epoch unknown": (request_for(epoch=None), "launch.epoch_closed"),
    "epoch closed": (request_for(epoch=replace(GOOD.epoch, accept_until=0)), "launch.epoch_closed"),
    "launch outlives epoch": (request_for(replace(FIELDS, not_after=NOW + 3721)), "launch.epoch_closed"),
    "no lease": (request_for(leases=()), "launch.sequence_not_leased"),
    "lease of another launcher": (request_for(leases=lease(launcher=b"K" * 32)), "launch.sequence_not_leased"),
    "lease of another epoch": (request_for(leases=lease(epoch=6)), "launch.sequence_not_leased"),
    "sequence beyond lease": (request_for(leases=lease(count=3)), "launch.sequence_not_leased"),
    "sequence before lease": (request_for(leases=lease(first=4)), "launch.sequence_not_leased"),
    "lease void": (request_for(leases=lease(void=True)), "launch.sequence_not_leased"),
    "lease over": (request_for(leases=lease(not_after=Instant(NOW - 1))), "launch.sequence_not_leased"),
    "no packages": (
        request_for(service=replace(GOOD.service, packages=frozenset())),
        "launch.package_not_registered",
    ),
    "package with other measurement": (
        request_for(service=replace(GOOD.service, packages=frozenset({(b"p" * 32, b"n" * 48)}))),
        "launch.package_not_registered",
    ),
    "no profiles": (
        request_for(service=replace(GOOD.service, profiles=frozenset())),
        "launch.profile_not_permitted",
    ),
    "other platform": (request_for(host=host(platform_chip=b"y" * 64)), "launch.platform_not_registered"),
    "no platform chip": (request_for(host=host(platform_chip=None)), "launch.platform_not_registered"),
    "no result": (request_for(host=host(result=None, problem="result.none")), "launch.host_not_standing"),
    "result of another host": (request_for(host=result(subject="host/h2")), "launch.host_not_standing"),
    "result expired": (request_for(host=result(expires=NOW)), "launch.host_not_standing"),
    "nothing affirmed": (request_for(host=result(vector={})), "launch.host_not_standing"),
    "warning": (request_for(host=result(vector={"executables": Tier.WARNING})), "launch.host_not_standing"),
    "rule not met": (request_for(host=result(findings=(NOT_MET,))), "launch.host_not_standing"),
    "gap": (request_for(host=host(gaps=("boot.measured is none",))), "launch.host_below_profile"),
}


def test_everything_holds():
    """verifies that: a request in which everything holds is released, and every rule is reported as met."""
    decision = decide(GOOD)
    decision.require()
    assert decision.refusal is None
    assert {finding.outcome for finding in decision.findings} == {Outcome.MET}


@pytest.mark.parametrize("what", TABLE)
def test_one_wrong_thing_refuses(what):
    """verifies that: one wrong thing is refused with its code, and all other rules were still run."""
    request, code = TABLE[what]
    decision = decide(request)
    with pytest.raises(Refused) as caught:
        decision.require()
    assert caught.value.code == code
    assert len(decision.findings) == len(decide(GOOD).findings)


def test_every_code_of_the_decision_is_in_the_table():
    """verifies that: no rule is without a case."""
    import re
    from pathlib import Path

    import moorline.hsm.release as module

    codes = set(re.findall(r'Refused\(\s*"(launch\.\w+)"', Path(module.__file__).read_text("utf-8")))
    assert codes == {code for _, code in TABLE.values()}


def test_no_field_of_a_request_may_be_left_out():
    """verifies that: a request has no defaults, so silence cannot release."""
    with pytest.raises(TypeError):
        ReleaseRequest()
    for field in dataclass_fields(ReleaseRequest):
        given = {f.name: getattr(GOOD, f.name) for f in dataclass_fields(ReleaseRequest) if f.name != field.name}
        with pytest.raises(TypeError):
            ReleaseRequest(**given)


def test_no_refusal_shows_a_secret():
    """verifies that: neither token nor proof is in any refusal."""
    token = launch.token(KEY, FIELDS)
    for request, _ in TABLE.values():
        shown = str(decide(request).refusal)
        assert token.hex() not in shown
        assert launch.token_proof(token, DIGEST).hex() not in shown
