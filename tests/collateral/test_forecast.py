"""Which platforms fall out of date, and when: under a false root, and by Intel's real evaluations 17 to 19."""

import dataclasses
import json

import pytest

from moorline.cli.collateral_facts import parse_facts
from moorline.clock import Instant
from moorline.errors import Malformed
from moorline.evidence.dcap_quote import TeeType
from moorline.evidence.intel_collateral import (
    TcbStatus,
    parse_evaluation_numbers,
    parse_json,
    parse_qe_identity,
    parse_tcb_info,
    signed_document,
)
from moorline.verification.forecast import Evaluation, PlatformFacts, Prospect, facts_of_quote, forecast, rate
from moorline.verification.intel_endorsements import assemble

DAY = 86400
YEAR = 365 * DAY


def evaluation(world, tee, number, *, levels=None, identity=True):
    if levels is not None:
        world.intel.levels[tee, number] = levels
    info = parse_tcb_info(signed_document(world.intel.tcb_info(tee, str(number)), chain=None).body)
    qe = parse_qe_identity(signed_document(world.intel.identity(tee, str(number)), chain=None).body)
    return Evaluation(tcb_info=info, qe_identity=qe if identity else None)


def numbers(world, tee):
    return parse_evaluation_numbers(signed_document(world.intel.evaluations(tee), chain=None).body)


def stricter(world, tee):
    """Levels under which today's platform is out of date."""
    fake = world.intel.fakes[tee]
    return [fake.level(svn=6), fake.level(svn=5, status="OutOfDate", advisories=["INTEL-SA-09999"])]


@pytest.fixture(params=["sgx", "tdx"])
def tee(request):
    return request.param


@pytest.fixture
def platform(world, tee):
    return facts_of_quote("h1", world.intel.quote(tee))


def told(world, tee, platform, later, *, standard=17):
    return forecast(
        platform,
        None if standard is None else evaluation(world, tee, standard),
        later,
        evaluations=numbers(world, tee),
        lag_s=YEAR,
    )


def test_a_quote_says_what_its_platform_is(world, tee, platform):
    fake = world.intel.fakes[tee]
    assert (platform.fmspc, platform.components, platform.pce_svn) == (fake.fmspc, (5,) * 16, 11)
    assert platform.qe_isv_svn == 7
    assert (platform.tee_tcb_svn is None) == (tee == "sgx")


def test_a_platform_falls_at_the_first_evaluation_that_asks_for_more(world, tee, platform):
    later = [evaluation(world, tee, 19, levels=stricter(world, tee)), evaluation(world, tee, 18)]
    found = told(world, tee, platform, later)
    assert found.prospect is Prospect.FALLS
    assert (found.now.status, found.now.evaluation) == (TcbStatus.UP_TO_DATE, 17)
    assert (found.then.status, found.then.evaluation) == (TcbStatus.OUT_OF_DATE, 19)
    assert found.advisories == {"INTEL-SA-09999"}
    assert found.expected == found.event + YEAR


def test_a_platform_that_is_good_throughout_stays(world, tee, platform):
    found = told(world, tee, platform, [evaluation(world, tee, 18), evaluation(world, tee, 19)])
    assert (found.prospect, found.then.evaluation) == (Prospect.STAYS, 19)


def test_a_platform_that_is_out_already_is_told_so(world, tee, platform):
    old = dataclasses.replace(platform, components=(4,) * 16)
    found = told(world, tee, old, [evaluation(world, tee, 19)])
    assert (found.prospect, found.now.status) == (Prospect.OUT, TcbStatus.OUT_OF_DATE)


def test_without_a_later_evaluation_nothing_is_said(world, tee, platform):
    assert told(world, tee, platform, []).prospect is Prospect.UNKNOWN
    assert told(world, tee, platform, [evaluation(world, tee, 17), evaluation(world, tee, 16)]).prospect is Prospect.UNKNOWN
    nothing = told(world, tee, platform, [evaluation(world, tee, 19)], standard=None)
    assert (nothing.prospect, nothing.now) == (Prospect.UNKNOWN, None)


def test_a_quoting_enclave_that_falls_takes_its_platform_along(world, tee, platform):
    world.intel.fakes[tee].qe_levels = [world.intel.any.isv(8), world.intel.any.isv(7, "OutOfDate", ["INTEL-SA-00777"])]
    strict = evaluation(world, tee, 19)
    assert rate(platform, strict).status is TcbStatus.OUT_OF_DATE
    assert rate(platform, strict).advisories == {"INTEL-SA-00777"}
    blind = rate(platform, dataclasses.replace(strict, qe_identity=None))
    assert blind.status is TcbStatus.UP_TO_DATE
    assert "quoting enclave" not in blind.parts


def test_a_tdx_module_that_falls_takes_its_platform_along(world):
    platform = facts_of_quote("h1", world.intel.quote("tdx"))
    world.intel.fakes["tdx"].modules = [world.intel.any.module(1, 4, 3)]
    rating = rate(platform, evaluation(world, "tdx", 19))
    assert rating.status is TcbStatus.OUT_OF_DATE
    world.intel.fakes["tdx"].modules = [world.intel.any.module(3, 4)]
    assert rate(platform, evaluation(world, "tdx", 20)).status is TcbStatus.NOT_SUPPORTED


def test_a_rating_is_the_one_verification_gives(world, tee, platform):
    fake = world.intel.fakes[tee]
    for svn in (5, 4, 3):
        fake.components = [svn] * 16
        rated = rate(facts_of_quote("h1", world.intel.quote(tee)), evaluation(world, tee, 17))
        assert rated.status == fake.verify().value.platform.status


# ---------------------------------------------------------------- Intel's own


def test_intels_real_evaluations_17_to_19(shared):
    """FMSPC 00606A000000 in June 2025: what was up to date at 17 or 18 is out of date at 19, and since when is signed."""
    folder = shared / "vectors/sgx/tcb-eval-data-number-selection"
    infos = {}
    for number in (8, 13, 14, 17, 18, 19):
        data = (folder / f"00606a000000-{number}.tcb.json").read_bytes()
        infos[number] = Evaluation(
            tcb_info=parse_tcb_info(assemble([("tcb-info-raw-json", data)]).tcb_info.body), qe_identity=None
        )
        assert infos[number].number == number
    raw = parse_json((folder / "tcb_evaluation_data_numbers.numbers.json").read_bytes())
    listed = parse_evaluation_numbers(raw["raw_tcb_evaluation_data_numbers"].encode())
    best = infos[17].tcb_info.levels[0]
    platform = PlatformFacts(
        name="an Ice Lake of 2024",
        tee=TeeType.SGX,
        fmspc=bytes.fromhex("00606a000000"),
        components=best.components,
        pce_svn=best.pce_svn,
        tee_tcb_svn=None,
        qe_isv_svn=None,
    )
    ratings = {number: rate(platform, one).status for number, one in infos.items()}
    found = forecast(platform, infos[17], list(infos.values()), evaluations=listed, lag_s=YEAR)
    falls = [number for number in (18, 19) if ratings[number] is TcbStatus.OUT_OF_DATE]
    assert falls
    assert found.prospect is Prospect.FALLS
    assert (found.now.evaluation, found.then.evaluation) == (17, falls[0])
    events = {18: 1_731_369_600, 19: 1_747_094_400}  # 2024-11-12, 2025-05-13
    assert found.event == Instant(events[falls[0]])
    assert found.advisories


# ---------------------------------------------------------------- facts in a file


GOOD = {
    "name": "rack-7",
    "tee": "tdx",
    "fmspc": "90c06f000000",
    "components": [5] * 16,
    "pce_svn": 11,
    "tee_tcb_svn": "05010200000000000000000000000000",
    "qe_isv_svn": 4,
}


def test_facts_in_a_file():
    (platform,) = parse_facts(json.dumps({"platforms": [GOOD]}).encode())
    assert (platform.name, platform.tee, platform.pce_svn, platform.qe_isv_svn) == ("rack-7", TeeType.TDX, 11, 4)
    assert platform.tee_tcb_svn[:3] == bytes([5, 1, 2])


@pytest.mark.parametrize(
    "change",
    [
        {"tee": "sev"},
        {"tee": "sgx"},
        {"tee_tcb_svn": None},
        {"tee_tcb_svn": "05"},
        {"fmspc": "90c06f00000g"},
        {"fmspc": 7},
        {"components": [5] * 15},
        {"components": [256] * 16},
        {"components": [True] * 16},
        {"pce_svn": -1},
        {"name": ""},
        {"qe_isv_svn": "4"},
        {"more": 1},
    ],
)
def test_facts_that_are_none(change):
    with pytest.raises(Malformed, match="collateral.facts"):
        parse_facts(json.dumps({"platforms": [GOOD | change]}).encode())


@pytest.mark.parametrize(
    "document", [b"[]", b"{}", b'{"platforms": {}}', b'{"platforms": [], "more": 1}', b'{"platforms": [7]}']
)
def test_a_file_that_holds_no_facts(document):
    with pytest.raises(Malformed, match="collateral.facts"):
        parse_facts(document)
