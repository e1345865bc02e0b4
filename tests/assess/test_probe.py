"""`moor host probe`: what only trying shows. Each probe has a control, and says nothing where it is not found."""

import contextlib
import dataclasses
import json
import os
import random
import socket
import sys
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from moorline.attesters.probes import capturing, leftovers, machine, observing, tpm_random
from moorline.attesters.probes.tree import Tree
from moorline.cli import app
from moorline.clock import SystemClock
from moorline.errors import Malformed, Misconfigured, Refused, Unavailable
from moorline.policy.sec009 import capture, observer, probed
from moorline.policy.sec009.assessment import Status

FAST = observing.Windows(count=8, seconds=0.02)


# Capture ----------------------------------------------------------------------------------------------------------------


class Tap(threading.Thread):
    """A point of capture: delivers a copy of what comes to `into`, each as often as `copies` says of its place."""

    def __init__(self, copies=lambda place: 1):
        super().__init__(daemon=True)
        self.taken = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.taken.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8 << 20)
        self.taken.bind(("127.0.0.1", 0))
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as free:
            free.bind(("127.0.0.1", 0))
            self.out = free.getsockname()
        self.into, self.copies = self.taken.getsockname(), copies
        self.start()

    def run(self):
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            for place in range(1 << 30):
                data = self.taken.recv(2048)
                for _ in range(self.copies(place)):
                    sender.sendto(data, self.out)


STREAM = capturing.Stream(count=400, rate=4000)


def test_a_point_of_capture_that_delivers_all_is_met():
    tap = Tap()
    seen = capturing.probe(tap.into, tap.out, STREAM)
    assert (seen.status, seen.value) == (Status.MET, "1.000000")


def test_a_point_of_capture_that_loses_one_is_found_out():
    tap = Tap(lambda place: place != 200)
    seen = capturing.probe(tap.into, tap.out, STREAM)
    assert seen.status is Status.NOT_MET
    assert seen.reason.startswith("1 datagrams were lost")
    assert float(seen.value) < 1


def test_nothing_that_comes_out_and_no_address_are_no_answer():
    tap = Tap(lambda _: 0)
    assert capturing.probe(tap.into, tap.out, STREAM).status is Status.NOT_PROBED
    with pytest.raises(Unavailable) as refused:
        capturing.probe(tap.into, ("192.0.2.1", 9), STREAM)
    assert refused.value.code == "capture.address"


@given(st.data())
def test_each_loss_is_counted_and_a_count_that_misses_its_gaps_is_none(data):
    count = data.draw(st.integers(20, 200))
    left_out = capture.gaps(count, data.draw(st.integers(1, (count - 2) // 2)), data.draw(st.integers(0, 255)))
    assert left_out
    assert not left_out & {0, count - 1}
    sent = [number for number in range(count) if number not in left_out]
    kept = [number for number in sent if data.draw(st.booleans())]
    seen = capture.appraise([*kept, *kept], count=count, left_out=left_out)
    assert set(seen.lost) == set(sent) - set(kept)
    assert (seen.captured, seen.repeated, seen.control_held) == (len(kept), len(kept), True)
    assert seen.whole is (kept == sent)
    everything = capture.appraise(range(count), count=count, left_out=left_out)
    assert not everything.control_held
    assert not everything.whole
    assert capturing.judge(everything).status is Status.NOT_PROBED


# Concealment ------------------------------------------------------------------------------------------------------------


def test_what_was_planted_is_told_and_noise_is_not():
    """verifies that: the observer's test finds a difference that was planted, and alarms no more often than it says"""
    chance = random.Random(7)
    alarms = 0
    for _ in range(300):
        idle = [chance.gauss(0, 1) for _ in range(24)]
        alarms += observer.tell_apart(idle, [chance.gauss(0, 1) for _ in range(24)]).apart
        told = observer.tell_apart(idle, [chance.gauss(2, 1) for _ in range(24)])
        assert told.apart
        assert told.advantage > told.blind_below
    assert alarms <= 12
    same = observer.tell_apart([1.0] * 8, [1.0] * 8)
    assert (same.advantage, same.chance, same.keen) == (0.0, 1.0, False)
    assert observer.tell_apart([1.0] * 24, [1.0] * 24).keen
    with pytest.raises(Malformed) as refused:
        observer.tell_apart([0.0] * 7, [1.0] * 20)
    assert refused.value.code == "observer.windows"


@given(st.lists(st.integers(0, 5), min_size=8, max_size=20), st.lists(st.integers(0, 5), min_size=8, max_size=20))
def test_the_observer_counts_pairs(idle, used):
    told = observer.tell_apart(idle, used)
    pairs = [(one > other) - (one < other) for one in used for other in idle]
    assert told.advantage == pytest.approx(abs(sum(pairs)) / len(pairs))
    assert 0 <= told.chance <= 1


def test_an_observer_sees_a_load_and_not_what_does_nothing(tmp_path, monkeypatch):
    """verifies that: what the control shows and use does not is concealed, by a counter of this test"""
    counter = tmp_path / "counter"
    counter.touch()
    load = ("/bin/sh", "-c", f"while :; do echo x >> {counter}; done")
    monkeypatch.setitem(observing.CHANNELS, "cpu", lambda: float(counter.stat().st_size))
    monkeypatch.setattr(observing, "_own_load", lambda _: contextlib.nullcontext(load))
    concealed = observing.probe("cpu", ("/bin/true",), observing.Windows(count=20, seconds=0.005))
    assert (concealed.status, concealed.value) == (Status.MET, "advantage 0.00, unseen below 0.48")
    assert observing.probe("cpu", ("/bin/true",), FAST).status is Status.NOT_PROBED
    assert observing.probe("cpu", load, FAST).status is Status.NOT_MET
    assert observing.probe("cpu", (), FAST).status is Status.NOT_MET


def test_nothing_on_this_machine_conceals_memory():
    """verifies that: on its real counters use is not taken for concealed; other load makes the observer blind"""
    hold = "import time; held = bytearray(400 << 20); held[::4096] = b'x' * len(held[::4096]); time.sleep(9)"
    seen = observing.probe("ram", (sys.executable, "-c", hold), observing.Windows(count=24, seconds=0.06))
    assert seen.status in {Status.NOT_MET, Status.NOT_PROBED}


def test_a_blind_observer_says_nothing(monkeypatch):
    monkeypatch.setitem(observing.CHANNELS, "cpu", lambda: 0.0)
    seen = observing.probe("cpu", ("/bin/true",), FAST)
    assert (seen.status, seen.value) == (Status.NOT_PROBED, None)
    assert "blind" in seen.reason


@pytest.mark.parametrize("channel", observing.CHANNELS)
def test_every_channel_is_read_from_this_machine(channel):
    assert isinstance(observing.CHANNELS[channel](), float)


# Clean-up ---------------------------------------------------------------------------------------------------------------


def only(kind):
    return {kind: leftovers._seen(leftovers.KINDS[kind])}


def seen_here(kind):
    """Whether this machine lets this user plant and see a thing of this kind."""
    return only(kind)[kind] is not None


@pytest.mark.parametrize("kind", leftovers.KINDS)
def test_what_stays_is_named_and_what_went_is_not(kind, monkeypatch, tmp_path):
    """verifies that: a thing of each kind that is really left here is found, by its name alone too; once it is gone nothing
    is; where the kind cannot be seen on this machine nothing is said."""
    monkeypatch.setattr("moorline.attesters.probes.leftovers_storage._SHARED", (tmp_path,))
    before = only(kind)
    if before[kind] is None:
        assert leftovers.left(before, only(kind)) == {kind: None}
        assert leftovers.judge(leftovers.KINDS[kind].area, {kind: None}).status is Status.NOT_PROBED
        return
    if kind == "mounts":  # to plant one takes root and a mount that others see
        before = {kind: before[kind] - {next(one for one in before[kind] if one.startswith("mount /proc "))}}
    with leftovers.KINDS[kind].planted() as mine:
        assert mine in leftovers.left(before, only(kind))[kind]
        assert leftovers.left(before, only(kind), [mine]) == {kind: [mine]}
        seen = leftovers.judge(leftovers.KINDS[kind].area, {kind: [mine]})
        assert (seen.status, seen.reason) == (Status.NOT_MET, f"1 things are left: {mine}")
    if kind != "mounts":
        assert leftovers.left(before, only(kind), [mine]) == {kind: []}


def test_these_kinds_are_seen_by_any_user_of_this_machine():
    """verifies that: the test above is not empty: what needs no privilege is really planted and found."""
    assert all(map(seen_here, ("network", "processes", "shared memory", "semaphores", "queues", "mounts")))


@pytest.mark.parametrize("kind", leftovers.KINDS)
def test_a_view_that_misses_its_own_control_says_nothing(kind, monkeypatch):
    blind = dataclasses.replace(leftovers.KINDS[kind], read=set)
    monkeypatch.setitem(leftovers.KINDS, kind, blind)
    assert only(kind) == {kind: None}
    for before, now in ((None, frozenset()), (frozenset(), None)):
        assert leftovers.left({kind: before}, {kind: now}) == {kind: None}
    assert leftovers.left({}, {kind: frozenset("x")}) == {kind: None}  # a snapshot of before that kind was looked at


def test_nothing_left_meets_the_network_and_no_more():
    """verifies that: memory, storage and keys that are listed no more may not have been cleared"""
    for area, capability in leftovers.CAPABILITIES.items():
        clean = {name: [] for name, kind in leftovers.KINDS.items() if kind.area == area}
        seen = leftovers.judge(area, clean)
        assert (seen.capability, seen.status) == (capability, Status.MET if area == "network" else Status.NOT_PROBED)
        assert leftovers.judge(area, dict.fromkeys(clean)).status is Status.NOT_PROBED
        assert leftovers.judge(area, {**clean, next(iter(clean)): ["x"]}).status is Status.NOT_MET


# A TPM's random numbers -------------------------------------------------------------------------------------------------


def answers(kind):
    chance = random.Random(9)
    stock = [chance.randbytes(32) for _ in range(40)]
    biased = lambda size: bytes(chance.choice((0, chance.randrange(256))) for _ in range(size))  # noqa: E731
    return {
        "good": chance.randbytes,
        "short": lambda size: chance.randbytes(8),
        "stuck": bytes,
        "biased": biased,
        "recorded": lambda size: chance.choice(stock),
        "nothing": lambda size: b"",
    }[kind]


@pytest.mark.parametrize("kind", ["good", "short", "stuck", "biased", "recorded", "nothing"])
def test_a_bad_generator_is_found_and_a_good_one_proves_nothing(kind):
    seen = tpm_random.probe("a generator", answers(kind))
    assert seen.status is (Status.NOT_PROBED if kind in ("good", "short") else Status.NOT_MET), seen


def test_random_numbers_are_not_judged_by_tests_that_find_nothing(monkeypatch):
    for name in ("control", "repeated"):
        with monkeypatch.context() as patch:
            patch.setattr(tpm_random, name, lambda *_: False)
            seen = tpm_random.probe("a generator", answers("stuck"))
        assert (seen.status, "planted" in seen.reason) == (Status.NOT_PROBED, True)


@pytest.mark.story
def test_a_real_tpm_is_asked(tmp_path):
    """verifies that: a swtpm answers, passes, and the command says that this is no proof (exit 2)"""
    from moorline.simulators.tpm import SimulatedTpm

    (tmp_path / "t" / "state").mkdir(parents=True)
    with SimulatedTpm(tmp_path / "t") as simulated:
        answer = CliRunner().invoke(app, ["host", "probe", "entropy", "--tpm", simulated.tcti, "--json"])
    assert answer.exit_code == 2, answer.output
    seen = json.loads(answer.stdout)
    assert (seen["capability"], seen["status"]) == ("entropy.health", "not_probed")
    assert "4096 bytes in 128 answers" in seen["evidence"][0]


# The command, and what assess makes of its report ----------------------------------------------------------------------


def test_a_report_goes_into_the_assessment_and_no_others(tmp_path):
    tap, run = Tap(), CliRunner()
    report = tmp_path / "capture.json"
    where = ["--into", "{}:{}".format(*tap.into), "--out", "{}:{}".format(*tap.out)]
    answer = run.invoke(app, ["host", "probe", "capture", *where, "--count", "400", "--report", str(report), "--json"])
    assert answer.exit_code == 0, answer.output
    assert json.loads(answer.stdout)["status"] == "met"
    answer = run.invoke(app, ["host", "assess", "--json", "--probed", str(report)])
    assert answer.exit_code == 0, answer.output
    found = {one["id"]: one for one in json.loads(answer.stdout)["capabilities"]}["net.capture.ratio"]
    assert (found["status"], found["value"], found["assurance"]) == ("met", "1.000000", "asserted")

    host, now, data = machine.host_name(Tree()), SystemClock().now(), json.loads(report.read_text())
    for change, code in (
        ({"host": "another"}, "probe.other_host"),
        ({"at": now - 2 * 86400}, "probe.old"),
        ({"at": now + 3600}, "probe.old"),
        ({"capability": "root.tpm20.hardware"}, "probe.report"),
        ({"status": "declared"}, "probe.report"),
        ({"evidence": [1]}, "probe.report"),
        ({"more": 1}, "probe.report"),
    ):
        with pytest.raises((Refused, Malformed)) as refused:
            probed.parse_probed(json.dumps({**data, **change}).encode(), host=host, now=now)
        assert refused.value.code == code


def test_clean_up_is_two_commands(tmp_path, monkeypatch):
    monkeypatch.setattr("moorline.attesters.probes.leftovers_storage._SHARED", (tmp_path / "shared",))
    (tmp_path / "shared").mkdir()
    run, before, report = CliRunner(), tmp_path / "before.json", tmp_path / "report.json"

    def clean_up(*words, code):
        answer = run.invoke(app, ["host", "probe", "clean-up", *map(str, words)])
        assert answer.exit_code == code, answer.output
        return answer.output

    clean_up("--snapshot", before, code=0)
    network = ("--since", before, "--of", "network", "--about")
    with socket.socket() as left:
        left.bind(("127.0.0.1", 0))
        left.listen(1)
        mine = f":{left.getsockname()[1]} "
        assert mine in clean_up("--since", before, "--about", mine, code=1)
        clean_up(*network, mine, "--report", report, code=1)
    clean_up(*network, mine, code=0)
    assert json.loads(report.read_text())["capability"] == "cleanup.network"
    (tmp_path / "shared" / "secret").touch()
    assert "files: file " in clean_up("--since", before, "--of", "storage", "--of", "network", "--about", "secret", code=1)
    clean_up("--since", before, "--of", "everything", code=2)
    with pytest.raises(Misconfigured, match="probe.one_area"):
        run.invoke(app, ["host", "probe", "clean-up", "--since", before, "--report", report], catch_exceptions=False)
    before.write_bytes(os.urandom(20))
    with pytest.raises(Malformed, match="probe.snapshot"):
        run.invoke(app, ["host", "probe", "clean-up", "--since", str(before)], catch_exceptions=False)
