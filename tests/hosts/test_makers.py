"""A maker of TPMs revokes one that enrolled long ago: its host loses its verdict, and no other host does."""

import asyncio
import dataclasses
import sys
from pathlib import Path

import pytest

from moorline.clock import Instant
from moorline.errors import NotAuthentic, Refused
from moorline.rats import EvidenceRoot
from moorline.services.verifier_makers import Makers
from moorline.storage import verifier_chains
from moorline.storage.verifier_store import VerifierStore
from moorline.verification.tpm_revocation import Revocation

sys.path.insert(0, str(Path(__file__).parent))
from test_asking import House
from test_stories import Machine as Booted
from tpm_maker import TpmMaker

BENCHMARKS = str(Path(__file__).parents[2] / "benchmarks")
sys.path.append(BENCHMARKS)
# The fleet of the benchmark: keys that sign TPM quotes.
from host_poll import NOW, enrol  # noqa: E402

sys.path.remove(BENCHMARKS)  # names there, such as ledger, are folders of tests too


@pytest.fixture(scope="module")
def vendor():
    return TpmMaker(NOW)


@dataclasses.dataclass
class Watched:
    """Two hosts that stand, h1 with a TPM of `vendor` and h2 with one of another; and the lists that are held."""

    house: House
    makers: Makers
    crls: tuple = ()

    async def attests(self, host):
        authority = self.house.authority
        return await authority.appraise(host, self.house.machine.evidence(authority.challenge(host)))

    def told(self):
        events, _ = self.house.store.events(after=0, limit=99)
        return [(one.host, one.kind, one.code) for one in events[2:]]


@pytest.fixture
async def watched(vendor, tmp_path):
    house, other = House(f"sqlite:///{tmp_path / 'v.db'}", tmp_path), TpmMaker(NOW)
    enrol(house.store, "h2", house.machine)
    for host, whose in (("h1", vendor), ("h2", other)):
        house.store.enrol(house.store.host(host), chain=verifier_chains.packed(whose.brought))
    anchors = (*vendor.anchors, *other.anchors)
    found = Watched(house, None)
    found.makers = Makers(
        house.store,
        anchors=anchors,
        revocation=lambda: Revocation(crls=found.crls, not_required={}),
        authority=house.authority,
        clock=house.clock,
    )
    for host in ("h1", "h2"):
        assert (await found.attests(host)).status == "affirming"
    return found


def bad(vendor, **more):
    """The authority's list with the one on h1's die in it."""
    return vendor.crl("ca", vendor.die, number=7, **more)


async def test_a_host_whose_tpm_is_revoked_loses_its_verdict_and_no_other_does(watched, vendor):
    """verifies that: a list without the TPM changes nothing; one with it withdraws the result, with its own code, is told
    of once however often it is looked at, and no later evidence counts; the neighbour stands."""
    watched.crls = (vendor.crl("root"), vendor.crl("ca"))
    assert watched.makers.look() == ()
    watched.crls = (vendor.crl("root"), bad(vendor))
    assert watched.makers.look() == ("h1",)
    assert watched.makers.look() == ()
    with pytest.raises(Refused) as gone:
        watched.house.authority.standing("h1")
    assert (gone.value.code, gone.value.got) == ("result.withdrawn", "host.tpm_revoked")
    with pytest.raises(NotAuthentic) as refused:
        await watched.attests("h1")
    assert refused.value.code == "host.tpm_revoked"
    assert (await watched.attests("h2")).status == "affirming"
    assert watched.told() == [("h1", "verdict_lost", "host.tpm_revoked")]


async def test_evidence_that_is_under_way_when_the_list_comes_writes_nothing(watched, vendor):
    """verifies that: a host that is being judged by what was known before does not get its verdict back by that."""
    evidence = watched.house.machine.evidence(watched.house.authority.challenge("h1"))
    settle = watched.house.store.settle

    def late(changes, **terms):
        watched.crls = (vendor.crl("root"), bad(vendor))
        assert watched.makers.look() == ("h1",)
        return settle(changes, **terms)

    watched.house.store.settle = late
    with pytest.raises(NotAuthentic) as refused:
        await watched.house.authority.appraise("h1", evidence)
    assert refused.value.code == "tpm.nonce_mismatch"
    with pytest.raises(Refused):
        watched.house.authority.standing("h1")
    assert watched.told() == [("h1", "verdict_lost", "host.tpm_revoked")]


async def test_a_revocation_outlives_the_process_and_ends_by_a_newer_list_alone(watched, vendor, tmp_path):
    """verifies that: another process knows it without lists; with the list gone it stays; a list that ended revokes all the
    same; an older one and one that somebody forged take nothing back; a newer one of the same authority does."""
    watched.crls = (vendor.crl("root"), bad(vendor, start=-9, end=-8))
    assert watched.makers.look() == ("h1",)
    again = watched.house.process(VerifierStore.open(tmp_path / "v.db"))
    with pytest.raises(NotAuthentic) as refused:
        await again.appraise("h1", watched.house.machine.evidence(again.challenge("h1")))
    assert refused.value.code == "host.tpm_revoked"
    watched.crls = (vendor.crl("ca", number=6, start=-10), bad(vendor, start=-9, end=-8))
    assert watched.makers.look() == ()
    watched.crls = (vendor.crl("ca", number=99, key=vendor.keys["die"]), bad(vendor))
    assert watched.makers.look() == ()
    with pytest.raises(NotAuthentic):
        await watched.attests("h1")
    watched.crls = (vendor.crl("ca", number=8),)
    assert watched.makers.look() == ("h1",)
    assert (await watched.attests("h1")).status == "affirming"


async def test_an_ended_or_missing_list_takes_no_verdict_away(watched, vendor):
    """verifies that: a fleet does not go dark because nobody fetched a list, nor where its maker's root is gone."""
    for crls in ((), (vendor.crl("ca", start=-9, end=-8),)):
        watched.crls = crls
        assert watched.makers.look() == ()
    watched.makers._anchors = ()
    watched.crls = (bad(vendor),)
    assert watched.makers.look() == ()
    assert (await watched.attests("h1")).status == "affirming"


async def test_hosts_that_enrol_later_are_judged_and_the_others_not_again(watched, vendor, monkeypatch):
    """verifies that: between two changes of the lists only the newcomers' chains are read."""
    watched.crls = (bad(vendor),)
    watched.house.clock.at += 100
    watched.makers.look()
    enrol(watched.house.store, "h3", watched.house.machine)
    late = dataclasses.replace(watched.house.store.host("h3"), enrolled=Instant(watched.house.clock.at))
    watched.house.store.enrol(late, chain=verifier_chains.packed(vendor.brought))
    read = []
    chains = watched.house.store.ek_chains
    monkeypatch.setattr(watched.house.store, "ek_chains", lambda *, since: read.append(chains(since=since)) or read[-1])
    assert watched.makers.look() == ("h3",)
    assert set(read[0]) == {"h3"}


@pytest.mark.story
async def test_the_chain_of_a_tpm_is_kept_when_it_enrols_and_the_lists_are_looked_at_by_themselves(
    world, running, monkeypatch
):
    """verifies that: a real enrolment keeps what the TPM showed, and again what it shows when it enrols again."""
    monkeypatch.setattr("moorline.services.verifier_makers.LOOK_EVERY_S", 0.02)
    machine = Booted(world, running[0], "h1")
    authority = world.authority()
    agent = machine.agent(authority)
    for _ in range(2):
        await agent.enrol()
        (kept,) = authority._parts.store.ek_chains().values()
        assert kept.certificates == machine.tpm.endorsement().certificates
    looks = []
    makers = Makers(
        authority._parts.store,
        anchors=world.anchors,
        revocation=lambda: looks.append(1) or Revocation(crls=(), not_required={EvidenceRoot.TEST: "swtpm"}),
        authority=authority,
        clock=world.clock,
    )
    keeping = asyncio.create_task(makers.keep())
    async with asyncio.timeout(20):
        while len(looks) < 2:  # noqa: ASYNC110 - it happens in a thread
            await asyncio.sleep(0.02)
    keeping.cancel()
