"""Health tests of SP 800-90B: known cut-offs, a source that is stuck, one that is biased, one that is good."""

import os
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moorline.attesters.probes import slow
from moorline.attesters.probes.tree import Tree
from moorline.errors import Malformed
from moorline.policy.sec009 import noise as tests_of_noise
from moorline.policy.sec009.noise import WINDOW, appraise, control, proportion_cutoff, repetition_cutoff


@pytest.mark.parametrize(("entropy", "repetition", "proportion"), [(1, 31, 325), (4, 9, 71), (8, 5, 16)])
def test_the_cutoffs_are_those_that_others_compute(entropy, repetition, proportion):
    assert (repetition_cutoff(entropy), proportion_cutoff(entropy)) == (repetition, proportion)


def test_a_good_source_passes():
    assert appraise(random.Random(1).randbytes(8192), entropy=8).healthy


def test_a_stuck_source_fails_and_so_does_one_that_gets_stuck():
    assert not appraise(bytes(4096), entropy=1).healthy
    good = random.Random(2).randbytes(4096)
    assert not appraise(good[:2000] + b"\x07" * 40 + good[2000:], entropy=1).healthy


def test_a_biased_source_fails():
    drawn = random.Random(3)
    biased = bytes(0 if drawn.random() < 0.8 and number % 25 else drawn.randrange(1, 256) for number in range(4096))
    seen = appraise(biased, entropy=1)
    assert seen.proportion >= seen.proportion_cutoff
    assert not seen.healthy


def test_too_few_samples_are_no_start_up():
    assert not appraise(random.Random(4).randbytes(1000), entropy=8).healthy


@pytest.mark.parametrize("entropy", [0, -1, 9, 8.5])
def test_a_byte_holds_no_other_entropy(entropy):
    with pytest.raises(Malformed):
        appraise(b"", entropy=entropy)


@given(st.binary(max_size=3000))
def test_counts_stay_within_what_was_read(samples):
    seen = appraise(samples, entropy=1)
    assert 0 <= seen.repetition <= len(samples)
    assert 0 <= seen.proportion <= WINDOW


def observed(tree, noise):
    return {one.capability: one for one in slow.probe(tree, noise)}


def test_raw_samples_from_a_file_are_tested(tmp_path):
    good, stuck, few, pipe = (tmp_path / name for name in ("good", "stuck", "few", "pipe"))
    good.write_bytes(random.Random(5).randbytes(4096))
    stuck.write_bytes(b"\x55" * 4096)
    few.write_bytes(b"abc")
    os.mkfifo(pipe)
    tree = Tree(tmp_path)
    assert observed(tree, good)["entropy.health"].status.value == "met"
    assert observed(tree, stuck)["entropy.health"].status.value == "not_met"
    assert observed(tree, few)["entropy.health"].status.value == "not_met"
    assert observed(tree, pipe)["entropy.health"].status.value == "not_probed"
    assert observed(tree, tmp_path / "absent")["entropy.health"].status.value == "not_probed"


def test_another_machines_tree_has_no_device_to_ask(tmp_path):
    assert observed(Tree(tmp_path), None)["entropy.rate"].status.value == "not_probed"


def test_the_device_of_this_machine():
    """A pass over the kernel's conditioned bytes is no statement about noise."""
    seen = observed(Tree(), None)
    assert seen["entropy.health"].status.value in ("not_probed", "not_met")
    if os.access(slow.DEVICE, os.R_OK):
        assert "bytes/s" in (seen["entropy.rate"].value or "")


def test_tests_that_do_not_find_what_was_planted_say_nothing(tmp_path, monkeypatch):
    assert control()
    raw = tmp_path / "raw"
    raw.write_bytes(random.Random(3).randbytes(8192))
    assert observed(Tree(tmp_path), raw)["entropy.health"].status == "met"
    monkeypatch.setattr(tests_of_noise, "proportion_cutoff", lambda *_: 1000)
    assert not control()
    assert observed(Tree(tmp_path), raw)["entropy.health"].status == "not_probed"
