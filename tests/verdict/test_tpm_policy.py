"""Verifies that no field of a policy for TPM quotes can be left out, and that only what is demanded is met."""

import dataclasses

import pytest
from software_tpm import SoftwareTpm

from moorline.errors import Refused
from moorline.evidence import tpm_structures as tpm
from moorline.policy.host import HostPolicy
from moorline.policy.match import AllBits, Exact, NotRequired, OneOf
from moorline.policy.tpm import TpmFacts, TpmPolicy, appraise_tpm, policy_digest, require_tpm
from moorline.rats import EvidenceRoot, Outcome
from moorline.verification import vtpm

OPEN = NotRequired("a test")
NONCE = bytes(range(32))
PCRS = {0: b"\x01" * 32, 7: b"\x07" * 32}


def facts(root=EvidenceRoot.VIRTUAL):
    machine = SoftwareTpm()
    message, signature = machine.quote(NONCE, PCRS)
    key = vtpm.given_public(machine.public, root=root)
    quote = vtpm.verify_foreign_quote(
        message, tpm.parse_signature(signature), PCRS, key=key, nonce=NONCE, sha1=vtpm.Sha1.REFUSED
    )
    return TpmFacts(quote=quote, boot=None, files=None)


def policy(**demands):
    host = HostPolicy(**{field.name: OPEN for field in dataclasses.fields(HostPolicy)})
    fields = {field.name: OPEN for field in dataclasses.fields(TpmPolicy)} | {"host": host}
    return TpmPolicy(**fields | demands)


def refusals(given, wanted, *, simulated_allowed=False):
    findings = appraise_tpm(given, wanted, simulated_allowed=simulated_allowed)
    return [one.code for one in findings if one.outcome is Outcome.NOT_MET]


STRICT = {
    "root": OneOf(frozenset({EvidenceRoot.VIRTUAL, EvidenceRoot.HARDWARE})),
    "bank": Exact("sha256"),
    "selection": AllBits(0x81),
    "firmware_version": Exact(7),
    "pcr0": Exact(PCRS[0]),
    "pcr7": OneOf(frozenset({PCRS[7]})),
}


def test_a_quote_that_meets_everything_is_affirmed():
    findings = appraise_tpm(facts(), policy(**STRICT), simulated_allowed=False)
    assert {one.outcome for one in findings} == {Outcome.MET, Outcome.NOT_APPRAISED}
    require_tpm(findings)
    with pytest.raises(Refused, match=r"tpm\.policy_not_met"):
        require_tpm(())


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(TpmPolicy)])
@pytest.mark.parametrize("nothing", [None, 0, "yes", OneOf(frozenset())])
def test_silence_about_the_quote_refuses(field, nothing):
    found = refusals(facts(), policy(**STRICT | {field: nothing}))
    assert found == [f"tpm.{field}"]
    with pytest.raises(TypeError):
        TpmPolicy()


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(HostPolicy)])
def test_silence_about_boot_and_files_refuses(field):
    host = dataclasses.replace(policy().host, **{field: None})
    assert refusals(facts(), policy(**STRICT, host=host))


def test_a_pcr_outside_the_quote_meets_nothing():
    assert refusals(facts(), policy(pcr1=Exact(bytes(32)))) == ["tpm.pcr1"]


@pytest.mark.parametrize("demand", [Exact(EvidenceRoot.TEST), Exact(EvidenceRoot.HARDWARE)])
def test_a_simulated_root_never_counts_whatever_the_policy_says(demand):
    assert refusals(facts(EvidenceRoot.TEST), policy(root=demand)) == ["tpm.root"]
    assert refusals(facts(EvidenceRoot.TEST), policy()) == ["tpm.root"]
    allowed = refusals(facts(EvidenceRoot.TEST), policy(root=demand), simulated_allowed=True)
    assert allowed == ([] if demand.value is EvidenceRoot.TEST else ["tpm.root"])


def test_two_policies_have_two_names():
    host = dataclasses.replace(policy().host, secure_boot=Exact(value=True))
    names = {policy_digest(one) for one in (policy(), policy(**STRICT), policy(host=host), policy(pcr0=Exact(b"")))}
    assert len(names) == 4
