"""What a proof of standing says after each transaction that takes something away: at once, and for everything below."""

import pytest

from moorline.clock import Instant
from moorline.errors import Refused
from moorline.ledger import partial_tree, places, records, standing
from moorline.ledger import transactions as tx
from moorline.ledger.records import RevocationKind
from moorline.ledger.state import Applied

from .everything import World


class Shown:
    """Some keys of a state, shown by a real tree proof: nothing else can be read from it."""

    def __init__(self, state, keys):
        self._records, self._keys = state.records, set(keys)
        self._tree = partial_tree.PartialTree.parse(state.tree.prove(keys))
        assert self._tree.root == state.root
        self.time = Instant(state.time_ms // 1000)

    def record(self, key):
        digest = self._tree.lookup(key)
        if digest is None:
            raise Refused("ledger.absent", "proven absent")
        assert places.value_digest(self._records[key]) == digest
        return self._records[key]

    def absent(self, key):
        if self._tree.lookup(key) is not None:
            raise Refused("ledger.present", "proven present")


READINGS = {
    "provider": (standing.provider_keys("alpha"), lambda s: standing.active_provider(s, "alpha")),
    "hsm": (standing.hsm_keys("alpha", "hsm-1"), lambda s: standing.active_hsm(s, "alpha", "hsm-1")),
    "issuing CA": (standing.issuing_ca_keys("alpha", "ca-1"), lambda s: standing.active_issuing_ca(s, "alpha", "ca-1")),
    "orchestrator": (standing.orchestrator_keys("alpha", "o-1"), lambda s: standing.active_orchestrator(s, "alpha", "o-1")),
    "service": (standing.service_keys("alpha", "records"), lambda s: standing.active_service(s, "alpha", "records")),
    "platform": (standing.platform_keys("alpha", "h1"), lambda s: standing.active_platform(s, "alpha", "h1")),
    "values": (
        standing.reference_values_keys("alpha", "fw"),
        lambda s: standing.active_reference_values(s, "alpha", "fw"),
    ),
    "contract": (
        standing.contract_keys("c-2", provider="alpha", service="records", grantee="beta"),
        lambda s: standing.active_contract(s, "c-2"),
    ),
    "device": (
        standing.device_keys(provider="alpha", issuing_ca="ca-1", device="d-1", serial=255),
        lambda s: standing.standing_device(s, provider="alpha", issuing_ca="ca-1", device="d-1", serial=255),
    ),
    "instance": (
        standing.instance_keys(provider="alpha", issuing_ca="ca-1", service="records", instance="i-1", serial=255),
        lambda s: standing.standing_instance(
            s, provider="alpha", issuing_ca="ca-1", service="records", instance="i-1", serial=255
        ),
    ),
}


@pytest.fixture
def world(tmp_path):
    made = World(tmp_path / "c")
    made.applied("alpha", tx.RegisterReferenceValues(id="fw", kind="tpm", digest=bytes(32)))
    return made


def standings(world):
    """What stands, of everything above; for each that does not, its code."""
    found = {}
    for name, (keys, read) in READINGS.items():
        try:
            read(Shown(world.consortium.state, keys))
        except Refused as error:
            found[name] = error.code
    return found


def decided(world, action, names=None):
    assert isinstance(world.consortium.decide(action, *(() if names is None else (names,))), Applied)


def test_everything_stands_at_first(world):
    assert standings(world) == {}


def test_a_suspended_provider_has_nothing_that_stands_and_gets_all_of_it_back(world):
    """verifies that: in the very block, for every kind below it, and likewise the end of the suspension."""
    decided(world, tx.SuspendProvider(name="alpha"))
    assert set(standings(world)) == set(READINGS)
    assert set(standings(world).values()) == {"ledger.provider_not_active"}
    decided(world, tx.ReinstateProvider(name="alpha"))
    assert standings(world) == {}
    decided(world, tx.RemoveProvider(name="alpha"))
    assert set(standings(world).values()) == {"ledger.provider_not_active"}


def test_a_contract_falls_with_either_side(world):
    decided(world, tx.SuspendProvider(name="beta"))
    assert standings(world) == {"contract": "ledger.provider_not_active"}
    decided(world, tx.ReinstateProvider(name="beta"))
    world.applied("beta", tx.WithdrawAccess(contract="c-2"))
    assert standings(world) == {"contract": "ledger.contract_not_active"}


def test_what_a_retired_key_certified_falls_with_it(world):
    """verifies that: until the retire time all stands; from then on the HSM and the issuing CA under the old key do not."""
    new = world.consortium.provider("alpha", "alpha.test")
    retire_at = world.consortium.now_ms // 1000 + 60
    world.applied("alpha", tx.RotateProviderKey(certificate=new.der, retire_at=retire_at))
    assert standings(world) == {}
    world.consortium.now_ms = retire_at * 1000
    world.consortium.block()
    assert standings(world) == dict.fromkeys(("hsm", "issuing CA", "device", "instance"), "ledger.issuer_retired")


@pytest.mark.parametrize(
    ("body", "fallen"),
    [
        (tx.RevokeHsm(id="hsm-1"), {"hsm": "ledger.hsm_not_active"}),
        (tx.RevokeIssuingCa(id="ca-1"), dict.fromkeys(("issuing CA", "device", "instance"), "ledger.issuing_ca_not_active")),
        (tx.RevokeOrchestrator(id="o-1"), {"orchestrator": "ledger.orchestrator_not_active"}),
        (tx.RemoveService(name="records"), dict.fromkeys(("service", "contract", "instance"), "ledger.service_not_active")),
        (tx.RevokePlatform(id="h1"), {"platform": "ledger.platform_not_active"}),
        (tx.Revoke(kind=RevocationKind.DEVICE, id="d-1"), {"device": "ledger.revoked"}),
        (tx.Revoke(kind=RevocationKind.INSTANCE, id="i-1"), {"instance": "ledger.revoked"}),
        (tx.Revoke(kind=RevocationKind.CERTIFICATE, id="ff"), dict.fromkeys(("device", "instance"), "ledger.revoked")),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_is_revoked_falls_with_what_rests_on_it(world, body, fallen):
    world.applied("alpha", body)
    assert standings(world) == fallen


def test_another_providers_revocation_touches_nothing(world):
    for kind, what in ((RevocationKind.DEVICE, "d-1"), (RevocationKind.INSTANCE, "i-1"), (RevocationKind.CERTIFICATE, "ff")):
        world.applied("beta", tx.Revoke(kind=kind, id=what))
    assert standings(world) == {}


def test_a_global_revocation_is_the_consortiums_for_everybody(world):
    """verifies that: a measurement, a chip and a vendor's root are proven not revoked until a quorum says otherwise."""
    for kind in (RevocationKind.MEASUREMENT, RevocationKind.CHIP, RevocationKind.VENDOR_ROOT):
        keys = standing.revocation_keys(kind, records.CONSORTIUM, "ab")
        standing.not_revoked(Shown(world.consortium.state, keys), kind, records.CONSORTIUM, "ab")
        decided(world, tx.RevokeGlobally(kind=kind, id="ab"), ("authority-1", "authority-2", "authority-3"))
        with pytest.raises(Refused, match="ledger.revoked"):
            standing.not_revoked(Shown(world.consortium.state, keys), kind, records.CONSORTIUM, "ab")


def test_silence_counts_for_nothing(world):
    """verifies that: a proof that lacks one of the keys proves nothing, whichever it is."""
    for keys, read in READINGS.values():
        for missing in keys:
            rest = [key for key in keys if key != missing]
            with pytest.raises(Refused):
                read(Shown(world.consortium.state, rest))


def test_an_authoritys_keys_end_with_the_block_that_rotates_them(world):
    """verifies that: by quorum only; the old transaction key is refused from the next block on, and never comes back."""
    quorum = ("authority-1", "authority-3", "authority-4")
    following = world.authority("authority-2")
    action = world.authority_body(tx.RotateAuthorityKey, following)
    old = world.consortium.authorities["authority-2"]
    decided(world, action, quorum[:2])
    assert world.consortium.state.authority_set()["authority-2"] == old.checkpoint.public_key().public_bytes_raw()
    decided(world, action, quorum)
    assert world.consortium.state.authority_set()["authority-2"] == following.checkpoint.public_key().public_bytes_raw()
    assert world.tried("authority-2", tx.Approve(proposal="00"))[0].code == "ledger.key_unknown"
    world.consortium.authorities["authority-2"] = following
    back = world.consortium.decide(world.authority_body(tx.RotateAuthorityKey, old), quorum)
    assert back.code == "ledger.key_taken"
    again = world.consortium.decide(action, quorum)
    assert again.code == "ledger.already_registered"


def test_keys_that_were_given_up_come_back_under_no_name(world):
    """verifies that: a revoked HSM's, CA's, orchestrator's and removed provider's key is refused wherever it is offered."""
    hsm = records.parse(records.HsmRecord, world.consortium.state.get("hsm/alpha/hsm-0"))
    body = tx.RegisterOrchestrator(id="o-7", public_key=hsm.signing_public)
    assert world.tried("alpha", body)[0].code == "ledger.key_taken"
    delta = world.providers["delta"]
    again = world.consortium.authorities["authority-1"]
    from moorline.ledger import ceremony

    certificate = ceremony.issue_provider(
        again.ca, delta.ca.key.public_key(), name="omega", trust_domain="omega.test", now=Instant(1_790_000_000)
    )
    from .conftest import der

    admit = tx.AdmitProvider(name="omega", trust_domain="omega.test", certificate=der(certificate))
    assert world.consortium.decide(admit).code == "ledger.key_taken"


def test_raised_thresholds_count_and_proposals_are_bounded(world):
    """verifies that: a quorum can ask for more approvals, never for fewer; one authority cannot fill the ledger."""
    quorum = ("authority-1", "authority-2", "authority-3")
    decided(world, tx.SetParameter(name="provider_approvals", value=3), quorum)
    decided(world, tx.SuspendProvider(name="alpha"), quorum[:2])
    assert standings(world) == {}
    decided(world, tx.SuspendProvider(name="alpha"), quorum)
    assert standings(world) != {}
    decided(world, tx.SetParameter(name="open_proposals", value=1), quorum)
    from moorline.ledger import transactions

    outcome, _ = world.tried("authority-1", transactions.propose(tx.RetireAuthority(name="authority-4")))
    assert outcome.code == "ledger.too_many_proposals"
    world.consortium.now_ms += 8 * 86400 * 1000
    outcome, _ = world.tried("authority-1", transactions.propose(tx.RetireAuthority(name="authority-4")))
    assert isinstance(outcome, Applied)
