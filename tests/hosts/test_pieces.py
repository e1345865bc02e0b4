"""IMA lists that are too long for one message: they come in pieces, and are judged when they are whole."""

import dataclasses
import hashlib
import itertools
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as some

from moorline.attesters.tpm import Quoted
from moorline.clock import Instant
from moorline.errors import NotAuthentic, Refused
from moorline.evidence import ima as lists
from moorline.evidence import tpm_structures as tpm
from moorline.host_agent.attestation import FileLogs, HostAttestation
from moorline.policy import reference_values
from moorline.services.host_appraisal import MAX_PIECES, PIECES_S
from moorline.simulators import firmware
from moorline.storage.verifier_store import VerifierStore
from moorline.verification import ima
from moorline.wire import host as wire

sys.path.insert(0, str(Path(__file__).parent))
from test_asking import House
from test_stories import Direct

BENCHMARKS = str(Path(__file__).parents[2] / "benchmarks")
sys.path.append(BENCHMARKS)
# The fleet of the benchmark: keys that sign TPM quotes.
from host_poll import NOW, _entry  # noqa: E402

sys.path.remove(BENCHMARKS)  # names there, such as ledger, are folders of tests too

FILES = tuple((f"/srv/{number:04}/" + "d" * 3900, b"%d" % number) for number in range(1500))
"""Files with long names: an IMA list of them has some 6 MiB and few lines."""


class Chip:
    """The TPM of a machine of the benchmark, as an agent sees it."""

    def __init__(self, machine):
        self.machine = machine

    def quote(self, nonce, bank, selection):
        message, signature = self.machine.quote(nonce)
        return Quoted(attest=message, signature=signature, pcrs=dict(self.machine.pcrs))


class Long:
    """A host of `house` that ran many files; `set_of` is a set of reference values by which all of them may run."""

    def __init__(self, house, directory, files=FILES):
        self.house, self.machine, self.list = house, house.machine, directory / "ima"
        (directory / "events").write_bytes(self.machine.log)
        self.entries = list(lists.parse_ima(self.machine.ima))
        self.run(*files)
        self.logs = FileLogs(directory / "events", self.list)

    def run(self, *files):
        self.entries += [_entry(path, hashlib.sha256(content).digest()) for path, content in files]
        self.list.write_bytes(b"".join(lists.serialize_line(one) + b"\n" for one in self.entries))
        self.machine.pcrs[10] = ima.replay(self.entries, tpm.ALG_SHA256)

    def agent(self, authority=None):
        self.wire = Direct(authority or self.house.authority)
        return HostAttestation(host="h1", verifier=self.wire, tpm=Chip(self.machine), logs=self.logs, tag=None, period_s=1)

    def piece(self, challenge, lines=1, *, first=None):
        """Evidence of its own making: so many lines, and a promise that more follow."""
        made, first = self.machine.evidence(challenge), challenge.ima_from if first is None else first
        data = self.list.read_bytes().splitlines(keepends=True)[first : first + lines]
        return dataclasses.replace(made, ima_from=first, ima=b"".join(data), ima_more=True)


def set_of(*files, serial=1):
    values = firmware.reference_values(
        firmware.GOOD, name="good", not_before=Instant(NOW - 1000), not_after=Instant(NOW + 10**6), files=files
    )
    return reference_values.merge([dataclasses.replace(values, serial=serial)])


@pytest.fixture
def house(tmp_path):
    return House(f"sqlite:///{tmp_path / 'v.db'}", tmp_path)


def pieces(long):
    return [(sent.ima_from, sent.ima_more) for sent in map(wire.decode_evidence, long.wire.sent)]


async def test_a_list_of_six_mib_is_judged_after_a_reload_without_a_boot(house, tmp_path):
    """verifies that: a host whose list is longer than a message stands; new reference values are put in place, it sends its
    list anew in pieces and stands; by values that lack one of its files, found in a piece in the middle, it does not."""
    long = Long(house, tmp_path)
    assert long.list.stat().st_size > 5.5 * (1 << 20)
    house.authority.judge_by(set_of(*FILES))
    agent = long.agent()
    assert (await agent.attest()).status == "affirming"
    assert [more for _, more in pieces(long)] == [True, True, False]
    long.wire.sent.clear()
    assert (await agent.attest()).status == "affirming"
    assert pieces(long) == [(1504, False)]  # nothing is sent twice

    house.authority.judge_by(set_of(*FILES, ("/srv/new", b""), serial=2))
    long.wire.sent.clear()
    assert (await agent.attest()).status == "affirming"
    assert pieces(long)[1] == (0, True)  # it was challenged before, so first it went on where it was
    assert len(pieces(long)) == 4
    assert [one.kind for one in house.store.events(after=0, limit=9)[0]] == ["verdict_gained"]  # new values are no alarm

    house.authority.judge_by(set_of(*FILES[:800], *FILES[801:], serial=3))
    verdict = await agent.attest()
    assert (verdict.status, verdict.code) == ("contraindicated", "host.file_not_in_reference_values")
    assert house.authority.standing("h1").status == "contraindicated"


async def test_pieces_are_kept_when_the_verifier_starts_anew(house, tmp_path):
    """verifies that: another process over the same database goes on where the first one stopped, and gives the verdict."""
    long, reference = Long(house, tmp_path, FILES[:40]), set_of(*FILES[:40])
    house.authority.judge_by(reference)
    for lines in (10, 20):
        answer = await house.authority.appraise("h1", long.piece(house.authority.challenge("h1"), lines))
        assert (answer.ear, answer.status, answer.code) == (None, "none", "ima.unfinished")
    after = house.process(VerifierStore.open(tmp_path / "v.db"))
    after.judge_by(reference)
    agent = long.agent(after)
    assert (await agent.attest()).status == "affirming"
    assert pieces(long) == [(30, False)]


async def test_a_piece_gives_no_verdict_takes_none_away_and_answers_no_question(house, tmp_path):
    """verifies that: what stands ends with its lease and not later, however many pieces come; a suspicion stays open."""
    long = Long(house, tmp_path, ())
    house.authority._patience_until = Instant(0)
    stood = await long.agent().attest()
    long.run(("/tmp/.x/miner", b"miner"), ("/tmp/.x/second", b"second"), ("/tmp/.x/third", b"third"))
    await house.suspected()
    answer = await house.authority.appraise("h1", long.piece(house.authority.challenge("h1")))
    assert answer.ear is None
    assert house.authority.standing("h1").ear == stood.ear
    house.clock.at += 31
    await house.authority.appraise("h1", long.piece(house.authority.challenge("h1")))
    await house.authority.sweep()
    with pytest.raises(Refused) as refused:
        house.authority.standing("h1")
    assert (refused.value.code, refused.value.got) == ("result.withdrawn", "host.ask_unanswered")


@pytest.mark.parametrize("how", ["too many", "too long", "a clock that went back"])
async def test_a_host_that_never_finishes_is_refused_and_nothing_grows(house, tmp_path, how):
    """verifies that: a list that never ends is refused after so many pieces or so long, is one row of the same size all
    along, and the host may begin anew, which an honest one then does with success."""
    files = tuple((f"/srv/{number}", b"%d" % number) for number in range(MAX_PIECES + 10))
    long = Long(house, tmp_path, files)
    house.authority.judge_by(set_of(*files))
    sizes, most = set(), {"too many": MAX_PIECES, "too long": 5, "a clock that went back": 1}[how]
    for count in range(most):
        await house.authority.appraise("h1", long.piece(house.authority.challenge("h1"), first=count))
        held = house.store.progress("h1")
        sizes.add(len(held.standing) + len(held.ima_running))
        house.clock.at += {"too many": 1, "too long": PIECES_S // 5, "a clock that went back": -1}[how]
    with pytest.raises(Refused) as refused:
        await house.authority.appraise("h1", long.piece(house.authority.challenge("h1"), first=most))
    assert refused.value.code == "ima.never_whole"
    assert max(sizes) <= 256
    with pytest.raises(Refused) as gone:
        house.authority.standing("h1")
    assert gone.value.code == "result.none"
    assert house.authority.challenge("h1").ima_from == 0
    assert (await long.agent().attest()).status == "affirming"


async def test_pieces_that_are_no_pieces_of_the_list_are_refused_in_the_end(house, tmp_path):
    """verifies that: a piece that leaves out an entry, one that stands twice, and one with nothing in it lead nowhere."""
    long = Long(house, tmp_path, FILES[:6])
    house.authority.judge_by(set_of(*FILES[:6]))
    empty = long.piece(house.authority.challenge("h1"), 0)
    with pytest.raises(NotAuthentic) as refused:
        await house.authority.appraise("h1", empty)
    assert refused.value.code == "ima.replay_mismatch"
    lines = long.list.read_bytes().splitlines(keepends=True)
    for first in (lines[:4] + lines[5:6], lines[:5] + lines[4:5]):
        forged = dataclasses.replace(long.piece(house.authority.challenge("h1"), first=0), ima=b"".join(first))
        answer = await house.authority.appraise("h1", forged)
        last = dataclasses.replace(long.piece(answer.next, 99), ima_more=False)
        with pytest.raises(NotAuthentic) as refused:
            await house.authority.appraise("h1", last)
        assert refused.value.code == "ima.replay_mismatch"
    skipped = long.piece(house.authority.challenge("h1"), 2, first=4)
    with pytest.raises(Refused) as refused:
        await house.authority.appraise("h1", skipped)
    assert refused.value.code == "ima.wrong_offset"
    assert (await long.agent().attest()).status == "affirming"


@given(cuts=some.lists(some.integers(0, 12), max_size=4), extra=some.integers(0, 3))
def test_a_list_means_the_same_in_any_pieces(cuts, extra):
    """verifies that: wherever a list is cut, its entries and its end are those of the list in one, and no piece but one that
    reaches the quote is whole; entries behind the quote are left."""
    entries = [_entry(f"/bin/{number}", bytes([number]) * 32) for number in range(12)]
    lines = [lists.serialize_line(one) + b"\n" for one in entries]
    quoted = ima.replay(entries[: 12 - extra], tpm.ALG_SHA256)
    at = sorted({0, *cuts, 12})
    state, seen, whole = ima.initial(tpm.ALG_SHA256), [], False
    for start, end in itertools.pairwise(at):
        read = ima.verify_ima(state, b"".join(lines[start:end]), bank=tpm.ALG_SHA256, quoted=quoted, more=end < 12)
        state, whole = read.state, read.whole
        seen += read.entries
        if whole:
            break
        assert state.count == end < 12 - extra
    assert whole
    assert seen == entries[: 12 - extra]
    assert state == ima.ImaState(count=12 - extra, running=quoted)
