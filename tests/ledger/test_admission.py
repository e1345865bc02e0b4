"""What authorities decide together: stories of the state machine, and each way to be refused."""

from dataclasses import replace

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from moorline.clock import Instant, to_datetime
from moorline.ledger import ceremony, genesis, records, transactions
from moorline.ledger.checkpoint import quorum_of, tolerated_faults
from moorline.ledger.records import ProposalStatus, RevocationKind, Status
from moorline.ledger.state import Applied, Rejected
from moorline.ledger.transactions import (
    AdmitAuthority,
    AdmitProvider,
    Approve,
    ReinstateProvider,
    RemoveProvider,
    RetireAuthority,
    RevokeGlobally,
    SenderKind,
    SetParameter,
    SuspendProvider,
)
from moorline.wire import certificates, keys
from moorline.wire.certificates import Issuer

from .conftest import NAMES, NOW, consortium_at, der, hsm_body

QUORUM = NAMES[:3]


def record(consortium, kind, key):
    return records.parse(kind, consortium.state.get(key))


def refused(outcome, code):
    assert isinstance(outcome, Rejected), outcome
    assert outcome.code == code
    assert outcome.error().code == code


def test_two_of_four_authorities_admit_a_provider(consortium):
    """verifies that: one approval is not enough, two distinct ones are, and events tell."""
    provider = consortium.provider("alpha", "alpha.test")
    action = AdmitProvider(name="alpha", trust_domain="alpha.test", certificate=provider.der)
    payload = consortium.payload(SenderKind.AUTHORITY, "authority-1", transactions.propose(action))
    assert isinstance(consortium.send(payload, consortium.authorities["authority-1"].signer()), Applied)
    assert consortium.state.get("provider/alpha") is None
    proposal = transactions.proposal_id(payload)
    refused(consortium.as_authority("authority-1", Approve(proposal=proposal)), "ledger.already_approved")
    outcome = consortium.as_authority("authority-3", Approve(proposal=proposal))
    assert [event.kind for event in outcome.events] == ["approved", "provider_admitted"]
    found = record(consortium, records.ProviderRecord, "provider/alpha")
    assert (found.status, found.ca_certificates) == (Status.ACTIVE, (provider.der,))
    stored = record(consortium, records.ProposalRecord, records.proposal_key(proposal))
    assert (stored.status, stored.approvals) == (ProposalStatus.EXECUTED, ("authority-1", "authority-3"))
    refused(consortium.as_authority("authority-4", Approve(proposal=proposal)), "ledger.proposal_closed")


def test_thresholds_follow_from_the_number_of_authorities():
    assert [(n, quorum_of(n), tolerated_faults(n)) for n in (2, 3, 4, 7, 10, 13)] == [
        (2, 2, 0), (3, 3, 0), (4, 3, 1), (7, 5, 2), (10, 7, 3), (13, 9, 4),
    ]  # fmt: skip


def test_a_name_or_trust_domain_is_given_once_and_never_inside_another(consortium, alpha):
    cases = [
        ("ledger.name_taken", "alpha", "other.test"),
        ("ledger.name_taken", "consortium", "other.test"),
        ("ledger.trust_domain_taken", "gamma", "alpha.test"),
        ("ledger.trust_domain_taken", "gamma", "sub.alpha.test"),
        ("ledger.trust_domain_taken", "gamma", "test"),
        ("ledger.trust_domain_taken", "gamma", "consortium.test"),
        ("ledger.trust_domain_taken", "gamma", "a.consortium.test"),
        ("ledger.name_malformed", "Gamma", "gamma.test"),
        ("ledger.name_malformed", "gamma", "Gamma.test"),
    ]
    for code, name, trust_domain in cases:
        certificate = consortium.provider(name, "gamma.test").der
        action = AdmitProvider(name=name, trust_domain=trust_domain, certificate=certificate)
        refused(consortium.decide(action), code)
    removed = consortium.decide(RemoveProvider(name="alpha"))
    assert isinstance(removed, Applied)
    again = AdmitProvider(name="gamma", trust_domain="alpha.test", certificate=consortium.provider("g", "alpha.test").der)
    refused(consortium.decide(again), "ledger.trust_domain_taken")


def provider_certificate(issuer, *, constraints, critical=True, path_length=1, not_before=NOW - 60, not_after=NOW + 86400):
    key = ec.generate_private_key(ec.SECP256R1())
    builder = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([]))
        .issuer_name(issuer.certificate.subject)
        .public_key(key.public_key())
        .serial_number(5)
        .not_valid_before(to_datetime(Instant(not_before)))
        .not_valid_after(to_datetime(Instant(not_after)))
        .add_extension(x509.BasicConstraints(ca=True, path_length=path_length), critical=True)
        .add_extension(certificates._usage(ca=True), critical=True)
    )
    if constraints is not None:
        builder = builder.add_extension(constraints, critical=critical)
    return der(builder.sign(issuer.key, hashes.SHA256()))


def test_a_providers_certificate_is_issued_by_an_authority_and_constrained_exactly(consortium):
    """verifies that: every other certificate is refused, each with its code, at block time."""
    issuer = consortium.authorities["authority-1"].ca
    good = (
        consortium.provider("alpha", "alpha.test")
        .ca.certificate.extensions.get_extension_for_class(x509.NameConstraints)
        .value
    )
    wider = x509.NameConstraints([*good.permitted_subtrees, x509.DNSName("beta.test")], good.excluded_subtrees)
    no_ip = x509.NameConstraints(good.permitted_subtrees, good.excluded_subtrees[:1])
    stranger_key = ec.generate_private_key(ec.SECP256R1())
    stranger = Issuer(certificate=issuer.certificate, key=stranger_key)
    cases = [
        ("ledger.certificate_constraints", provider_certificate(issuer, constraints=None)),
        ("ledger.certificate_constraints", provider_certificate(issuer, constraints=good, critical=False)),
        ("ledger.certificate_constraints", provider_certificate(issuer, constraints=wider)),
        ("ledger.certificate_constraints", provider_certificate(issuer, constraints=no_ip)),
        ("ledger.certificate_constraints", consortium.provider("alpha", "beta.test").der),
        ("ledger.certificate_profile", provider_certificate(issuer, constraints=good, path_length=2)),
        ("ledger.certificate_validity", provider_certificate(issuer, constraints=good, not_after=NOW)),
        ("ledger.certificate_validity", provider_certificate(issuer, constraints=good, not_before=NOW + 900)),
        ("ledger.certificate_issuer", provider_certificate(stranger, constraints=good)),
        ("ledger.certificate_profile", der(issuer.certificate)),
        ("ledger.certificate_malformed", b"\x30\x00"),
    ]
    for code, certificate in cases:
        refused(consortium.decide(AdmitProvider(name="alpha", trust_domain="alpha.test", certificate=certificate)), code)
    fine = provider_certificate(issuer, constraints=good)
    assert isinstance(consortium.decide(AdmitProvider(name="alpha", trust_domain="alpha.test", certificate=fine)), Applied)


def test_a_suspended_provider_can_do_nothing_until_it_is_reinstated(consortium, alpha):
    assert isinstance(consortium.decide(SuspendProvider(name="alpha")), Applied)
    refused(consortium.as_provider(alpha, hsm_body(alpha)), "ledger.provider_suspended")
    refused(consortium.decide(SuspendProvider(name="alpha")), "ledger.provider_status")
    assert isinstance(consortium.decide(ReinstateProvider(name="alpha")), Applied)
    assert isinstance(consortium.as_provider(alpha, hsm_body(alpha)), Applied)
    refused(consortium.decide(ReinstateProvider(name="alpha")), "ledger.provider_status")
    refused(consortium.decide(SuspendProvider(name="nobody")), "ledger.provider_unknown")
    assert isinstance(consortium.decide(RemoveProvider(name="alpha")), Applied)
    refused(consortium.as_provider(alpha, hsm_body(alpha, hsm="hsm-2")), "ledger.provider_unknown")
    refused(consortium.decide(ReinstateProvider(name="alpha")), "ledger.provider_status")


def new_authority(consortium, name, directory):
    root_key = serialization.load_pem_private_key((directory / "root" / "root.key.pem").read_bytes(), None)
    root = x509.load_der_x509_certificate(consortium.made.genesis.roots[0])
    made = ceremony._authority(name, Issuer(certificate=root, key=root_key), NOW)
    consortium.authorities[name] = made
    return AdmitAuthority(
        name=name,
        certificate=der(made.ca.certificate),
        transaction_key=keys.public_bytes(made.transaction.public_key()),
        checkpoint_key=made.checkpoint.public_key().public_bytes_raw(),
        address="127.0.0.1:9",
    )


def test_authorities_come_and_go_by_quorum(consortium):
    """verifies that: two are not enough for this; a new one counts from the next block; a retired one has no voice."""
    action = new_authority(consortium, "authority-5", consortium.made.directory)
    assert isinstance(consortium.decide(action), Applied)
    assert "authority-5" not in consortium.state.authority_set()
    assert isinstance(consortium.decide(action, QUORUM), Applied)
    assert "authority-5" in consortium.state.authority_set()
    refused(consortium.decide(action, QUORUM), "ledger.name_taken")
    refused(consortium.decide(replace(action, name="authority-6"), QUORUM), "ledger.key_taken")
    other = replace(new_authority(consortium, "authority-6", consortium.made.directory), certificate=b"x")
    refused(consortium.decide(other, QUORUM), "ledger.certificate_malformed")

    # Five authorities: a quorum is four now.
    retire = RetireAuthority(name="authority-1")
    assert isinstance(consortium.decide(retire, ("authority-5", *NAMES[1:3])), Applied)
    assert "authority-1" in consortium.state.authority_set()
    assert isinstance(consortium.decide(retire, ("authority-5", *NAMES[1:4])), Applied)
    assert "authority-1" not in consortium.state.authority_set()
    refused(consortium.as_authority("authority-1", transactions.propose(retire)), "ledger.authority_unknown")
    refused(consortium.decide(retire, NAMES[1:2]), "ledger.authority_unknown")


def test_an_approval_by_an_authority_that_was_retired_since_does_not_count(consortium):
    certificate = consortium.provider("alpha", "alpha.test").der
    action = AdmitProvider(name="alpha", trust_domain="alpha.test", certificate=certificate)
    payload = consortium.payload(SenderKind.AUTHORITY, "authority-4", transactions.propose(action))
    consortium.send(payload, consortium.authorities["authority-4"].signer())
    assert isinstance(consortium.decide(RetireAuthority(name="authority-4"), QUORUM), Applied)
    approve = Approve(proposal=transactions.proposal_id(payload))
    assert isinstance(consortium.as_authority("authority-1", approve), Applied)
    assert consortium.state.get("provider/alpha") is None
    assert isinstance(consortium.as_authority("authority-2", approve), Applied)
    assert consortium.state.get("provider/alpha") is not None


def test_too_few_authorities_never_remain(consortium):
    for name, deciders in (("authority-4", NAMES[:3]), ("authority-3", NAMES[:3])):
        assert isinstance(consortium.decide(RetireAuthority(name=name), deciders), Applied)
    refused(consortium.decide(RetireAuthority(name="authority-2"), NAMES[:2]), "ledger.authorities_count")


def test_parameters_and_global_revocations_take_a_quorum_and_have_bounds(consortium):
    assert isinstance(consortium.decide(SetParameter(name="max_age_s", value=12), QUORUM), Applied)
    assert consortium.state.parameter("max_age_s") == 12
    for name, value in (("max_age_s", 1), ("simulated_allowed", 1), ("quorum", 1)):
        refused(consortium.decide(SetParameter(name=name, value=value), QUORUM), "ledger.parameter_bounds")
    chip = RevokeGlobally(kind=RevocationKind.CHIP, id="ab" * 32)
    assert isinstance(consortium.decide(chip, QUORUM), Applied)
    assert consortium.state.get(f"revocation/chip/consortium/{'ab' * 32}") is not None
    refused(consortium.decide(chip, QUORUM), "ledger.already_revoked")
    refused(consortium.decide(replace(chip, kind=RevocationKind.DEVICE), QUORUM), "ledger.revocation_kind")


def test_an_action_is_judged_again_when_it_is_completed(consortium):
    """verifies that: two proposals for one name can both be opened, and only one of them wins."""
    proposals = []
    for _ in range(2):
        action = AdmitProvider(
            name="alpha", trust_domain="alpha.test", certificate=consortium.provider("alpha", "alpha.test").der
        )
        payload = consortium.payload(SenderKind.AUTHORITY, "authority-1", transactions.propose(action))
        consortium.send(payload, consortium.authorities["authority-1"].signer())
        proposals.append(transactions.proposal_id(payload))
    assert isinstance(consortium.as_authority("authority-2", Approve(proposal=proposals[0])), Applied)
    refused(consortium.as_authority("authority-2", Approve(proposal=proposals[1])), "ledger.name_taken")


def test_an_old_proposal_expires_and_an_unknown_one_is_refused(consortium):
    payload = consortium.payload(
        SenderKind.AUTHORITY, "authority-1", transactions.propose(SetParameter(name="max_age_s", value=12))
    )
    consortium.send(payload, consortium.authorities["authority-1"].signer())
    consortium.now_ms += 8 * 24 * 3600 * 1000
    outcome = consortium.as_authority("authority-2", Approve(proposal=transactions.proposal_id(payload)))
    refused(outcome, "ledger.proposal_expired")
    refused(consortium.as_authority("authority-2", Approve(proposal="00" * 32)), "ledger.proposal_unknown")


@pytest.mark.parametrize(
    "change",
    [
        {"version": 0},
        {"version": 3},
        {"sequencer": "nobody"},
        {"parameters": genesis.Parameters(max_age_s=0)},
        {"roots": ()},
        {"authorities": "one"},
        {"authorities": "unordered"},
        {"authorities": "shared key"},
        {"time_ms": 0},
    ],
    ids=str,
)
def test_a_genesis_that_makes_no_sense_is_malformed(consortium, change):
    good = consortium.made.genesis
    first, second, *rest = good.authorities
    special = {
        "one": (first,),
        "unordered": (second, first, *rest),
        "shared key": (first, replace(second, checkpoint_key=first.checkpoint_key), *rest),
    }
    change = {key: special.get(value, value) if isinstance(value, str) else value for key, value in change.items()}
    with pytest.raises(Exception, match="ledger.genesis_malformed"):
        genesis.parse(replace(good, **change).encode())
    assert genesis.parse(good.encode()) == good


def test_the_ledger_id_covers_the_whole_genesis(tmp_path, consortium):
    good = consortium.made.genesis
    assert replace(good, simulated_allowed=False).ledger_id != good.ledger_id
    with pytest.raises(Exception, match="ledger.ceremony_done"):
        consortium_at(consortium.made.directory)
    modes = {
        path.name: path.stat().st_mode & 0o777 for path in consortium.made.directory.rglob("*.key.pem") if path.is_file()
    }
    assert set(modes.values()) == {0o600}
    assert len(list(consortium.made.directory.rglob("*.key.pem"))) == 13


def test_keys_of_the_wrong_kind_in_a_folder_are_named(consortium):
    folder = consortium.made.directory / "authorities" / "authority-1"
    (folder / "checkpoint.key.pem").write_bytes((folder / "ca.key.pem").read_bytes())
    with pytest.raises(Exception, match="ledger.authority_folder"):
        ceremony.load_authority(folder)


def test_a_leaf_of_an_authority_lives_at_most_an_hour(consortium):
    chain, _ = ceremony.tls_identity(consortium.authorities["authority-1"], "consortium.test", now=NOW)
    leaf = x509.load_pem_x509_certificates(chain)[0]
    assert (leaf.not_valid_after_utc - leaf.not_valid_before_utc).total_seconds() <= 3600
