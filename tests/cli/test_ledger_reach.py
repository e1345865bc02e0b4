"""Everything the ledger takes can be said by somebody at a command line, and answered for a program."""

from dataclasses import dataclass

import pytest
import typer
from tests.ledger.everything import World
from tests.ledger.test_standing import Shown

from moorline.cli import ledger_contract, provider_changes
from moorline.cli import run as moor
from moorline.clock import Instant
from moorline.ledger import transactions
from moorline.ledger import transactions as tx
from moorline.ledger.records import RevocationKind

REACH = {
    "Propose": ["authority admit"],
    "Approve": ["authority approve"],
    "AdmitAuthority": ["authority admit"],
    "RetireAuthority": ["authority retire"],
    "RotateAuthorityKey": ["authority rotate-key"],
    "SetParameter": ["authority set"],
    "RevokeGlobally": ["authority revoke"],
    "AdmitProvider": ["provider admit"],
    "SuspendProvider": ["provider suspend"],
    "ReinstateProvider": ["provider reinstate"],
    "RemoveProvider": ["provider remove"],
    "RotateProviderKey": ["provider rotate-key"],
    "RegisterIssuingCa": ["provider register issuing-ca"],
    "RevokeIssuingCa": ["provider revoke"],
    "RegisterHsm": ["provider register hsm"],
    "RotateHsm": ["provider update hsm"],
    "RevokeHsm": ["provider revoke"],
    "RegisterOrchestrator": ["provider register orchestrator"],
    "RevokeOrchestrator": ["provider revoke"],
    "RegisterService": ["provider register service"],
    "UpdateService": ["provider update service"],
    "RemoveService": ["provider revoke"],
    "RegisterPlatform": ["provider register platform"],
    "RevokePlatform": ["provider revoke"],
    "RegisterReferenceValues": ["provider register reference-values"],
    "OfferAccess": ["contract offer"],
    "AcceptAccess": ["contract accept"],
    "WithdrawAccess": ["contract withdraw"],
    "Revoke": ["provider revoke"],
    "AnchorLog": ["provider anchor"],
}


def test_every_kind_has_a_command():
    assert set(REACH) == {*transactions.ACTIONS, *transactions.AUTHORITY_BODIES, *transactions.PROVIDER_BODIES}


@pytest.mark.parametrize("command", sorted({one for names in REACH.values() for one in names} | {"ledger contract test"}))
def test_the_command_is_there_and_speaks_json(command, capsys):
    assert moor([*command.split(), "--help"]) == 0
    assert "--json" in capsys.readouterr().out


def test_revoking_a_record_ends_that_record():
    """verifies that: `moor provider revoke KIND ID` is the transaction of that kind, and unknown kinds are wrong use."""
    ends = {
        "issuing-ca": tx.RevokeIssuingCa(id="x"),
        "hsm": tx.RevokeHsm(id="x"),
        "orchestrator": tx.RevokeOrchestrator(id="x"),
        "platform": tx.RevokePlatform(id="x"),
        "service": tx.RemoveService(name="x"),
        **{kind.value: tx.Revoke(kind=kind, id="x") for kind in RevocationKind if kind is not RevocationKind.VENDOR_ROOT},
    }
    for kind, body in ends.items():
        assert provider_changes._ending(kind, "x") == body
    for kind in ("vendor-root", "everything", ""):
        with pytest.raises(typer.BadParameter):
            provider_changes._ending(kind, "x")


@dataclass
class Asker:
    """Somebody who reads the ledger by real tree proofs, without a network."""

    world: World

    def prove(self, *keys):
        return Shown(self.world.consortium.state, keys)


@pytest.fixture(scope="module")
def asker(tmp_path_factory):
    world = World(tmp_path_factory.mktemp("world") / "c")
    terms = """
        @id("ours") permit(principal, action, resource) when { principal.provider == "beta" };
        @id("nights") forbid(principal, action, resource) when { context.hour < 6 };
    """
    offer = tx.OfferAccess(contract="hours", service="records", grantee="beta", conditions=terms, profiles=("tls",))
    world.applied("alpha", offer)
    world.applied("beta", tx.AcceptAccess(contract="hours"))
    world.applied("beta", tx.Revoke(kind=RevocationKind.DEVICE, id="lost"))
    return Asker(world)


NOON, NIGHT = Instant(1_790_078_400), Instant(1_790_046_000)


@pytest.mark.parametrize(
    ("contract", "device", "profile", "at", "allowed", "policies", "why"),
    [
        ("hours", "d-1", "tls", NOON, True, ["ours"], "ours (permit, line 2)"),
        ("hours", "d-1", "tls", NIGHT, False, ["nights"], "nights (forbid, line 3)"),
        ("hours", "d-1", "no-pfs", NOON, False, [], "nopfs.not_allowed"),
        ("hours", "lost", "tls", NOON, False, [], "ledger.revoked"),
        ("c-1", "d-1", "tls", NOON, False, [], "ledger.contract_not_active"),
    ],
)
def test_a_contract_says_whom_it_would_let_in_and_why(asker, contract, device, profile, at, allowed, policies, why):
    """verifies that: the answer names the policy and its line, or what on the ledger stands in the way."""
    asked = ledger_contract.Question(device=device, profile=profile, post_quantum=profile != "no-pfs", at=at)
    found = ledger_contract.judged(asker, contract, asked, None)
    assert (found["allowed"], found["policies"]) == (allowed, policies)
    assert why in found["why"]


def test_another_text_can_be_tried_before_it_is_offered(asker):
    asked = ledger_contract.Question(device="d-1", profile="tls", post_quantum=True, at=NOON)
    text = 'permit(principal, action, resource) when { principal.device like "x-*" };'
    assert ledger_contract.judged(asker, "hours", asked, text)["allowed"] is False
    with pytest.raises(Exception, match="conditions.malformed"):
        ledger_contract.judged(asker, "hours", asked, "permit(")
