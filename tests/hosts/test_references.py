"""A running verifier reads its reference values again: all of them good, or none of it happened."""

import asyncio
import dataclasses
import json
import sys
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from moorline.clock import Instant, SystemClock
from moorline.errors import Malformed, Misconfigured, MoorlineError, NotAuthentic, Refused
from moorline.policy import host, reference_values
from moorline.services import verifier_anchors, verifier_references
from moorline.services.verifier_references import References, Sources
from moorline.simulators import firmware
from moorline.wire import keys

sys.path.insert(0, str(Path(__file__).parent))
from served import Served
from test_policy import appraise
from test_service import NOW
from test_stories import Machine


def signed(key, profile=firmware.GOOD, *, serial=1, name="good", start=NOW - 60):
    values = firmware.reference_values(profile, name=name, not_before=Instant(start), not_after=Instant(NOW + 3000))
    return reference_values.sign(dataclasses.replace(values, serial=serial), keys.KeySigner(key))


@dataclasses.dataclass
class House:
    """A verifier over files of reference values."""

    served: Served
    references: References
    file: Path
    key: ec.EllipticCurvePrivateKey

    @property
    def digest(self):
        return self.served.authority.reference.digest


@pytest.fixture
def house(world, tmp_path):
    served, file = Served(world), tmp_path / "good.cose"
    file.write_bytes(signed(world.reference_key))
    sources = Sources(
        paths=(file,),
        signers=(world.reference_key.public_key(),),
        store=served.authority._parts.store,
        clock=SystemClock(),
    )
    reference, sets = sources.read()
    served.authority.judge_by(reference)
    references = References(sources, sets, served.authority)
    verifier_references.add_routes(served.app, references, trust_domain="alpha.test")
    return House(served, references, file, world.reference_key)


async def until(question):
    async with asyncio.timeout(20):
        while not question():  # noqa: ASYNC110 - it happens to a file
            await asyncio.sleep(0.05)


@pytest.mark.story
async def test_a_new_set_is_judged_by_without_a_restart(house, world, running, monkeypatch):
    """verifies that: a host with an updated kernel is refused, its set is put in place, and it is affirmed by the same
    running verifier; who runs the old kernel is not any more."""
    monkeypatch.setattr(verifier_references, "LOOK_EVERY_S", 0.05)
    updated = Machine(world, running[0], "h1", firmware.CHANGED_KERNEL)
    old = Machine(world, running[1], "h2")
    agents = [machine.agent(house.served.authority) for machine in (updated, old)]
    for agent in agents:
        await agent.enrol()
    assert [(await agent.attest()).status for agent in agents] == ["contraindicated", "affirming"]
    keeping = asyncio.create_task(house.references.keep())
    try:
        before = house.digest
        house.file.write_bytes(signed(house.key, firmware.CHANGED_KERNEL, serial=2))
        await until(lambda: house.digest != before)
        assert [(await agent.attest()).status for agent in agents] == ["affirming", "contraindicated"]
    finally:
        keeping.cancel()


STRANGER = ec.generate_private_key(ec.SECP256R1())
BAD = {
    "a stranger's": (lambda key: signed(STRANGER, serial=2), NotAuthentic),
    "garbage": (lambda key: b"\xff" * 40, Malformed),
    "half a file": (lambda key: signed(key, serial=2)[:-20], MoorlineError),
    "an older set": (lambda key: signed(key, serial=0), Refused),
    "a set of the future": (lambda key: signed(key, serial=2, start=NOW + 1000), Refused),
    "nothing": (lambda key: None, Misconfigured),
}


@pytest.mark.parametrize("what", BAD)
async def test_a_bad_set_is_refused_and_the_old_one_stays_in_force(house, what):
    """verifies that: whatever is wrong with what is there now, the verifier goes on by what was good, and says what is
    wrong; when it is mended it is taken."""
    before, (make, kind) = house.digest, BAD[what]
    data = make(house.key)
    if data is None:
        house.file.unlink()
    else:
        house.file.write_bytes(data)
    with pytest.raises(kind) as refused:
        await house.references.reload()
    assert (house.digest, house.references.last) == (before, refused.value)
    house.file.write_bytes(signed(house.key, firmware.CHANGED_KERNEL, serial=3))
    await house.references.reload()
    assert house.digest != before
    assert house.references.last is None


async def test_one_bad_set_among_good_ones_changes_nothing(house, tmp_path):
    """verifies that: a folder of sets is taken as a whole: with one bad set in it not even the good new one counts."""
    folder = tmp_path / "sets"
    folder.mkdir()
    sources = dataclasses.replace(house.references._sources, paths=(folder,))
    (folder / "boot.cose").write_bytes(signed(house.key))
    references = References(sources, sources.read()[1], house.served.authority)
    await references.reload()
    before = house.digest
    (folder / "boot.cose").write_bytes(signed(house.key, firmware.CHANGED_KERNEL, serial=2))
    (folder / "more.cose").write_bytes(signed(STRANGER, name="more"))
    with pytest.raises(NotAuthentic):
        await references.reload()
    assert house.digest == before
    (folder / "more.cose").unlink()
    await references.reload()
    assert house.digest != before
    (folder / "boot.cose").unlink()
    with pytest.raises(Refused) as refused:  # an empty folder accepts nothing, and is no policy
        await references.reload()
    assert refused.value.code == "reference.none"


async def test_an_operator_reloads_and_hears_what_was_wrong(house, tmp_path):
    async with house.served.serving():
        async with house.served.client("spiffe://alpha.test/operator/ann") as ann:
            shown = await ann.get_json("/v1/references")
            assert (shown["sets"][0]["serial"], shown["refused"]) == (1, None)
            house.file.write_bytes(signed(STRANGER, serial=2))
            with pytest.raises(NotAuthentic):
                await ann.post_json("/v1/references/reload", {})
            assert (await ann.get_json("/v1/references"))["refused"]["code"] == "reference.signer_unknown"
            code, _, err = await house.served.moor(tmp_path, "verifier", "reload")
            assert (code, "reference.signer_unknown" in err) == (1, True)
            house.file.write_bytes(signed(house.key, serial=2))
            code, out, _ = await house.served.moor(tmp_path, "verifier", "reload", "--json")
            assert (code, json.loads(out)["good"]) == (0, 2)
            assert (await ann.post_json("/v1/references/reload", {}))["sets"][0]["serial"] == 2
        for uri in ("spiffe://alpha.test/host/h1", "spiffe://alpha.test/orchestrator/o1", "spiffe://beta.test/operator/bob"):
            async with house.served.client(uri) as stranger:
                with pytest.raises(Refused):
                    await stranger.post_json("/v1/references/reload", {})


# What counts as a list, and whose fault damaged collateral is ----------------------------------------------------------


def test_a_list_in_which_no_policy_measured_anything_is_refused():
    """verifies that: boot_aggregate alone, which every kernel writes, shows no run-time integrity; a file does."""
    alone = host.FileStanding(entries=1, unlisted=0, violations=0, first_unlisted=())
    result = appraise(files=alone)
    assert result.first_refusal().code == "host.ima_missing"
    shown = {one.capability for one in result.capabilities}
    assert not {"ima.measurement", "integrity.runtime"} & shown
    assert appraise(files=dataclasses.replace(alone, entries=2)).first_refusal() is None


def test_a_damaged_list_of_a_tpm_maker_is_this_verifiers_fault(tmp_path, monkeypatch):
    """verifies that: a collateral store that was changed behind its back is an error of the server (500), and not the
    enrolling host's (400)."""
    from types import SimpleNamespace

    def damaged(_):
        raise Malformed("collateral.store_damaged", "an item was changed since it was put here")

    monkeypatch.setattr(verifier_anchors, "open_collateral", lambda path, create: path)
    monkeypatch.setattr(verifier_anchors, "tpm_crls", damaged)
    configured = SimpleNamespace(tpm_crls_not_required={}, tpm_collateral=tmp_path)
    with pytest.raises(Misconfigured) as refused:
        verifier_anchors.revocation_reader(configured)()
    assert (refused.value.code, refused.value.http_status) == ("verifier.collateral_damaged", 500)
