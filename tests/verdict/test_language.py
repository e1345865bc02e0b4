"""Verifies that a policy is complete or does not exist, in every family and every notation."""

import dataclasses
import json
import typing

import pytest

from moorline.clock import Instant
from moorline.errors import Misconfigured
from moorline.policy import language, notation
from moorline.policy.match import AllBits, AtLeast, Exact, NotRequired, OneOf
from moorline.rats import Outcome


def parsed(written):
    text = language.parse_policy(json.dumps(written).encode())
    return language.resolve(text, (), now=Instant(0), highest={})


def paths(kind, before=()):
    for name, hint in typing.get_type_hints(kind).items():
        yield (*before, name)
        if isinstance(hint, type) and dataclasses.is_dataclass(hint):
            yield from paths(hint, (*before, name))


EVERY_FIELD = [(family, path) for family, one in language.FAMILIES.items() for path in paths(one.kind)]


def test_the_walk_sees_every_family():
    assert len(EVERY_FIELD) > 150
    assert {family for family, _ in EVERY_FIELD} == {"snp", "tdx", "sgx", "cca", "psa", "nitro", "tpm"}


@pytest.mark.parametrize(("family", "path"), EVERY_FIELD, ids=lambda one: one if isinstance(one, str) else ".".join(one))
def test_leaving_out_any_field_of_any_family_refuses_the_policy(documents, family, path):
    written = documents(family)
    assert parsed(written).digest
    holder = written["demands"]
    for name in path[:-1]:
        holder = holder[name]
    for wrong in ("left out", None, {}, {"exact": None}, {"one_of": []}, {"not_required": " "}):
        if wrong == "left out":
            del holder[path[-1]]
        else:
            holder[path[-1]] = wrong
        with pytest.raises(Misconfigured):
            parsed(written)


@pytest.mark.parametrize("family", sorted(language.FAMILIES))
def test_a_field_that_is_none_behind_the_languages_back_is_not_met(documents, family):
    """The types cannot keep Python from handing None to a policy; its appraisal then says no, whatever the value."""
    policy = parsed(documents(family)).policy
    rules = {field.name for field in dataclasses.fields(policy)}
    assert rules
    from moorline.policy import intel
    from moorline.policy import rules as shared_rules

    for judge in (shared_rules.judged, lambda *a, **k: intel.finding(a[0], "hardware", a[1], a[2])):
        assert judge(f"{family}.field", b"x", None, claim="hardware", remedy=None).outcome is Outcome.NOT_MET


def test_every_word_of_the_language(documents):
    demands = {
        "product": {"one_of": ["Milan", "Genoa"]},
        "measurement": {"exact": "00ff"},
        "reported_tcb": {"at_least": {"boot_loader": 3, "tee": 0, "snp": 8, "microcode": 115}},
        "platform_info": {"all_bits": 32},
        "abi": {"at_least": [1, 51]},
    }
    policy = parsed(documents("snp", **demands)).policy
    assert policy.measurement == Exact(b"\x00\xff")
    assert policy.abi == AtLeast((1, 51))
    assert policy.platform_info == AllBits(32)
    assert isinstance(policy.product, OneOf)
    assert isinstance(policy.debug, NotRequired)
    written = documents("tdx")
    written["demands"]["platform"] |= {"status": {"exact": "UpToDate"}, "advisories": {"within": ["INTEL-SA-1"]}}
    assert parsed(written).policy.platform.advisories.accepted == frozenset({"INTEL-SA-1"})
    written["demands"]["platform"]["advisories"] = {"none_of": []}
    with pytest.raises(Misconfigured, match="empty_rejection"):
        parsed(written)


@pytest.mark.parametrize(
    "demand",
    [
        {"exact": "zz"},
        {"exact": 12},
        {"at_least": {"boot_loader": 3}},
        {"at_least": {"boot_loader": 3, "tee": 0, "snp": 8, "microcode": 115, "fcm": 1}},
        {"all_bits": 0},
        {"anything": True},
        {"exact": "00", "one_of": ["00"]},
        "00",
    ],
)
@pytest.mark.parametrize("field", ["measurement", "reported_tcb", "platform_info"])
def test_a_demand_of_the_wrong_type_is_no_demand(documents, field, demand):
    if (field, demand) in (("measurement", {"exact": 12}), ("platform_info", {"exact": 12})):
        demand = {"exact": "quote me"}
    with pytest.raises(Misconfigured, match="policy_file"):
        parsed(documents("snp", **{field: demand}))


def test_two_policies_that_differ_have_different_names(documents):
    plain = documents("nitro")
    digests = {parsed(plain).digest, parsed(documents("nitro", debug={"exact": False})).digest}
    digests.add(parsed(plain | {"supplied_keys": "hardware"}).digest)
    digests.add(parsed(documents("psa")).digest)
    assert len(digests) == 4


# ---------------------------------------------------------------- notations


YAML = b"""
# a comment
word: no
digest: 1e10
number: 0x1F
none: null
yes_really: true
date: 2026-01-01
list: &shared [a, 12, "12"]
again: *shared
nested: {a: {b: c}}
"""


def test_yaml_guesses_nothing():
    pytest.importorskip("yaml")
    found = notation.read_document(YAML)
    assert found["word"] == "no"
    assert found["digest"] == "1e10"
    assert (found["number"], found["none"], found["yes_really"]) == (31, None, True)
    assert found["date"] == "2026-01-01"
    assert found["again"] == ["a", 12, "12"]
    assert found["nested"] == {"a": {"b": "c"}}


def test_the_same_policy_in_yaml_json_and_toml_has_one_name(documents):
    yaml = pytest.importorskip("yaml")
    written = documents("nitro", debug={"exact": False}, pcr0={"one_of": ["ab" * 48]})
    lines = ['family = "nitro"\nsupplied_keys = "software"\n[demands]']
    for name, demand in written["demands"].items():
        ((word, value),) = demand.items()
        lines.append(f"{name} = {{ {word} = {json.dumps(value)} }}")
    texts = (json.dumps(written), yaml.safe_dump(written), "\n".join(lines))
    digests = {
        language.resolve(language.parse_policy(text.encode()), (), now=Instant(0), highest={}).digest for text in texts
    }
    assert len(digests) == 1


@pytest.mark.parametrize(
    "text",
    [
        b"a: 1\na: 2",
        b'{"a": 1, "a": 2}',
        b"a = 1\na = 2",
        b"- not a mapping",
        b"\xff",
        b"a: !!python/object/apply:os.system [x]",
        b"a: [",
        b"{" * 5000,
        b"a: &a [*a, *a]",
    ],
)
def test_documents_that_are_refused(text):
    pytest.importorskip("yaml")
    with pytest.raises(Misconfigured, match=r"document\."):
        notation.read_document(text)


def test_aliases_cannot_make_a_small_text_endless():
    pytest.importorskip("yaml")
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 9)]
    with pytest.raises(Misconfigured, match=r"document\.too_large"):
        notation.read_document("\n".join(lines).encode())


def test_without_pyyaml_json_and_toml_are_still_read(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "yaml", None)
    assert notation.read_document(b'{"a": 1}') == {"a": 1}
    assert notation.read_document(b"a = 1") == {"a": 1}
    with pytest.raises(Misconfigured, match=r"document\.no_yaml"):
        notation.read_document(b"a: 1")
