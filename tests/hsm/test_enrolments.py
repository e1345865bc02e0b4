"""What the store decides about enrolments: codes, accounts, manufacturers' identities, quotas, keys made here."""

from __future__ import annotations

from dataclasses import replace

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from moorline.clock import Instant
from moorline.errors import Conflict, MoorlineError, NotAuthentic, Refused, Unavailable
from moorline.storage.broker_certificates import Issued
from moorline.storage.broker_enrolments import Account, Applicant, EnrolmentStore, Waiting
from moorline.storage.broker_revocations import RevocationStore
from moorline.storage.broker_store import BrokerStore

NOW = Instant(1_800_000_000)
CREW = Account(account="crew@alpha.test", prefix="meter-", remaining=2, not_after=Instant(NOW + 100), approval=False)
IDENTITY = ("CN=Maker", "SN-1")


class Desk:
    """A store and certificates for it; serial numbers count."""

    def __init__(self, store, *, quota=4):
        self.store = store
        self.revocations = RevocationStore(store)
        self.enrolments = EnrolmentStore(store, self.revocations, quota=quota)
        self.made = 0

    def code(self, device, digest=b"c" * 32, until=NOW + 100):
        self.enrolments.set_code(device, code_digest=digest, not_after=Instant(until), at=NOW)

    def enrol(self, applicant, key=b"k", *, at=NOW, server_key=False):
        self.made += 1
        issued = Issued(
            serial=f"{self.made:x}",
            spiffe_id=f"spiffe://alpha.test/device/{applicant.device}",
            key_digest=key,
            not_after=Instant(at + 3600),
            der=b"",
        )
        self.enrolments.enrol(applicant, key_digest=key, issued=issued, at=Instant(at), server_key=server_key)
        return issued.serial

    def revoked(self):
        return {one.serial for one in self.revocations.listed(expired_after=NOW)}


@pytest.fixture
def desk(store):
    return Desk(store)


def by_code(device="phone-1", digest=b"c" * 32):
    return Applicant(device=device, code_digest=digest)


def test_a_code_binds_to_its_first_key(desk):
    desk.code("phone-1")
    assert desk.enrol(by_code()) != desk.enrol(by_code())
    with pytest.raises(Refused, match="est.code_used"):
        desk.enrol(by_code(), b"thief")
    (alarm,) = desk.store.alarms()
    assert alarm.code == "est.code_used"
    assert alarm.first != alarm.second == f"phone-1 {b'thief'.hex()}"  # both keys are named, the thief's second


@pytest.mark.parametrize("wrong", [by_code(digest=b"x" * 32), by_code("phone-2")])
def test_a_wrong_code_is_not_authentic(desk, wrong):
    desk.code("phone-1")
    with pytest.raises(NotAuthentic, match="est.code_invalid"):
        desk.enrol(wrong)


def test_an_expired_code_is_not_authentic(desk):
    desk.code("phone-1", until=NOW - 1)
    with pytest.raises(NotAuthentic, match="est.code_invalid"):
        desk.enrol(by_code())


def test_a_key_made_here_that_is_fetched_again_revokes_the_certificate_before(desk):
    desk.code("phone-1")
    first, second, third = (desk.enrol(by_code(), server_key=True) for _ in range(3))
    assert desk.revoked() == {first, second}
    own = desk.enrol(by_code())  # a key of the device's own replaces nothing
    assert desk.revoked() == {first, second}
    assert third != own


def test_nothing_is_recorded_for_who_is_refused(desk):
    desk.code("phone-1")
    kept = desk.enrol(by_code(), server_key=True)
    with pytest.raises(Refused):
        desk.enrol(by_code(), b"thief", server_key=True)
    assert desk.revoked() == set()
    assert [one.serial for page in desk.revocations.unexpired(NOW) for one in page] == [kept]


def test_a_device_has_its_quota_and_gets_more_when_one_ended(desk):
    desk.code("phone-1", until=NOW + 9999)
    for n in range(4):
        desk.enrol(by_code(), at=NOW + n)
    with pytest.raises(Unavailable, match="est.quota") as refusal:
        desk.enrol(by_code(), at=NOW + 10)
    assert refusal.value.retry_after_s == 3590
    desk.code("phone-2")
    desk.enrol(by_code("phone-2"), at=NOW + 10)  # another device has its own
    desk.enrol(by_code(), at=NOW + 3601)


def opened(desk, **changes):
    account = replace(CREW, **changes)
    desk.enrolments.open_account(account, password="right", salt=b"s" * 16, at=NOW)
    return Applicant(device="meter-1", account=account.account)


def test_an_account_enrols_its_devices_and_no_more(desk):
    first = opened(desk)
    assert desk.enrolments.account("crew@alpha.test", "right", at=NOW).prefix == "meter-"
    desk.enrol(first)
    desk.enrol(first)  # a retry with the same key costs nothing
    desk.enrol(replace(first, device="meter-2"))
    with pytest.raises(Refused, match="est.account_exhausted"):
        desk.enrol(replace(first, device="meter-3"))


@pytest.mark.parametrize(
    ("name", "password", "at"), [("crew", "right", 0), ("crew@alpha.test", "wrong", 0), ("crew@alpha.test", "right", 101)]
)
def test_a_wrong_password_or_an_ended_account_opens_nothing(desk, name, password, at):
    opened(desk)
    with pytest.raises(NotAuthentic, match="est.credentials"):
        desk.enrolments.account(name, password, at=Instant(NOW + at))


def test_an_installer_has_no_right_over_a_device_that_is_there(desk):
    """verifies that: a password that leaked cannot take the name of an enrolled device, nor of one that waits."""
    desk.code("meter-1")
    desk.enrol(by_code("meter-1"))
    thief = opened(desk)
    with pytest.raises(Refused, match="est.device_known"):
        desk.enrol(thief, b"thief")
    with pytest.raises(Refused, match="est.other_device"):
        desk.enrol(replace(thief, device="phone-1"), b"thief")
    desk.enrol(replace(thief, device="meter-2"), b"first")
    with pytest.raises(Refused, match="est.device_known"):
        desk.enrol(replace(thief, device="meter-2"), b"second")


def test_an_enrolment_waits_for_a_person(desk):
    applicant = opened(desk, approval=True)
    for _ in range(2):
        with pytest.raises(Unavailable, match="est.waiting"):
            desk.enrol(applicant)
    assert [(one.device, one.state) for one in desk.enrolments.waiting()] == [("meter-1", Waiting.ASKED)]
    desk.enrolments.decide_waiting("meter-1", approved=True, at=NOW)
    desk.enrol(applicant)
    with pytest.raises(Refused, match="est.nothing_waits"):
        desk.enrolments.decide_waiting("meter-1", approved=False, at=NOW)
    with pytest.raises(Unavailable, match="est.waiting"):
        desk.enrol(replace(applicant, device="meter-2"))
    desk.enrolments.decide_waiting("meter-2", approved=False, at=NOW)
    with pytest.raises(Refused, match="est.refused"):
        desk.enrol(replace(applicant, device="meter-2"))


def test_a_manufactured_device_begins_anew(desk):
    desk.enrolments.expect_manufactured(issuer=IDENTITY[0], serial_number=IDENTITY[1], device="meter-1", at=NOW)
    assert desk.enrolments.manufactured(*IDENTITY) == "meter-1"
    applicant = Applicant(device="meter-1", manufactured=IDENTITY)
    first = desk.enrol(applicant, b"a")
    desk.enrol(applicant, b"b")  # after a factory reset it has another key
    assert desk.revoked() == {first}
    with pytest.raises(Refused, match="est.not_expected"):
        desk.enrolments.manufactured("CN=Maker", "SN-2")
    with pytest.raises(Refused, match="est.not_expected"):
        desk.enrol(replace(applicant, manufactured=("CN=Other", "SN-1")))
    for issuer, serial in (("CN=Other", "SN-9"), ("CN=Other", IDENTITY[1]), (IDENTITY[0], "SN-9")):
        with pytest.raises(Conflict, match="est.device_taken"):
            desk.enrolments.expect_manufactured(issuer=issuer, serial_number=serial, device="meter-1", at=NOW)


def test_a_device_that_was_never_here_does_not_reenrol(desk):
    with pytest.raises(Refused, match="est.device_unknown"):
        desk.enrol(Applicant(device="phone-1", renews="ab"))


class Enrolment(RuleBasedStateMachine):
    """Any order of codes, keys and thieves: a code serves one key, and no certificate of a thief's key is ever recorded."""

    def __init__(self):
        super().__init__()
        self.desk = Desk(BrokerStore.open("sqlite://"), quota=100)
        self.codes, self.bound, self.good = {}, {}, set()

    @rule(device=st.sampled_from(["a", "b"]), digest=st.binary(min_size=32, max_size=32))
    def new_code(self, device, digest):
        self.desk.code(device, digest)
        self.codes[device] = digest
        self.bound.pop(device, None)

    @precondition(lambda self: self.codes)
    @rule(data=st.data(), key=st.sampled_from([b"1", b"2"]), right=st.booleans(), server_key=st.booleans())
    def asks(self, data, key, right, server_key):
        device = data.draw(st.sampled_from(sorted(self.codes)))
        digest = self.codes[device] if right else b"wrong" + self.codes[device][5:]
        may = right and self.bound.get(device, key) == key
        try:
            serial = self.desk.enrol(by_code(device, digest), key, server_key=server_key)
        except MoorlineError as error:
            assert not may or error.code == "est.code_invalid"
            assert digest != self.codes[device] or not may
            return
        assert may or digest == self.codes[device]
        self.bound[device] = key
        self.good.add(serial)

    @invariant()
    def only_rightful_certificates(self):
        recorded = {one.serial for page in self.desk.revocations.unexpired(NOW) for one in page} | self.desk.revoked()
        assert recorded == self.good

    def teardown(self):
        self.desk.store.close()


TestEnrolment = Enrolment.TestCase
TestEnrolment.settings = settings(max_examples=12, stateful_step_count=20, deadline=None)


def test_a_key_pair_of_the_token_is_a_p256_key(token):
    from moorline.hsm.pool import new_key

    first, second = new_key(token), new_key(token)
    assert isinstance(first.curve, ec.SECP256R1)
    assert first.private_numbers() != second.private_numbers()
