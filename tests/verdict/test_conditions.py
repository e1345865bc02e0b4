"""What a contract may say: read and typed by the ledger's own rules, and asked of the Cedar engine each time."""

import json

import cedarpy
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from moorline.errors import Malformed
from moorline.policy.conditions import (
    ATTRIBUTES,
    MAX_DEPTH,
    MAX_ELEMENTS,
    MAX_POLICIES,
    cedar_schema,
    policies_in,
    require_valid,
)

SCHEMA = json.dumps(cedar_schema())
HEAD = "permit(principal, action, resource)"
REQUEST = {
    "principal": 'Moorline::Device::"d"',
    "action": 'Moorline::Action::"connect"',
    "resource": 'Moorline::Service::"s"',
    "context": {"contract": "c", "profile": "tls", "post_quantum": True, "now": 5, "hour": 0, "weekday": 4},
}
ENTITIES = [
    {
        "uid": {"__entity": {"type": "Moorline::Device", "id": "d"}},
        "attrs": {"device": "d", "provider": "beta", "trust_domain": "beta.test"},
        "parents": [],
    },
    {
        "uid": {"__entity": {"type": "Moorline::Service", "id": "s"}},
        "attrs": {"provider": "alpha", "service": "s", "use_case": "4.7", "profiles": ["tls"]},
        "parents": [],
    },
]


def judged(text):
    """The code with which it is refused, or None."""
    try:
        require_valid(text, max_bytes=16 * 1024)
    except Malformed as error:
        return error.code
    return None


def engine_takes(text):
    found = cedarpy.validate_policies(text, SCHEMA)
    assert found.validation_passed, (text, [str(error) for error in found.errors])
    answer = cedarpy.is_authorized(REQUEST, text, ENTITIES, SCHEMA)
    assert answer.diagnostics.errors == [], (text, answer.diagnostics.errors)


GOOD = [
    f"{HEAD};",
    'permit(principal, action == Moorline::Action::"connect", resource);',
    'permit(principal == Moorline::Device::"spiffe://beta.test/device/d-1", action, resource is Moorline::Service);',
    f'@id("a") {HEAD}; @note("no nights") @id("b") forbid(principal, action, resource) when {{ context.hour < 6 }};',
    f'{HEAD} when {{ principal.provider == "beta" && !(principal.device like "test-*") }} unless {{ context.weekday > 5 }};',
    f"{HEAD} when {{ if context.now >= 1 then resource.profiles.contains(context.profile) else false }};",
    f'{HEAD} when {{ ["a", "b"].containsAny(resource.profiles) || !!(1 != 2) }};',
    f'{HEAD} when {{ principal == Moorline::Device::"x" || principal.device == "\\"\\\\" }}; // why\n',
    f'{HEAD} when {{ resource.provider like "\\*a\\\\*" }};',
]


@pytest.mark.parametrize("text", GOOD)
def test_what_the_ledger_takes_the_engine_takes(text):
    """verifies that: both accept it, and evaluating it errs nowhere."""
    assert judged(text) is None
    engine_takes(text)


@pytest.mark.parametrize(
    ("code", "text"),
    [
        ("conditions.malformed", ""),
        ("conditions.malformed", "   \n// nothing\n"),
        ("conditions.malformed", HEAD),
        ("conditions.malformed", "permit(principal, action);"),
        ("conditions.malformed", f"{HEAD} when {{ true }}"),
        ("conditions.malformed", f"{HEAD} when {{ }};"),
        ("conditions.malformed", f"{HEAD} when {{ 1 < 2 < 3 }};"),
        ("conditions.malformed", f"{HEAD} when {{ !!!!!true }};"),
        ("conditions.malformed", f"{HEAD} when {{ context.now == 9223372036854775808 }};"),
        ("conditions.malformed", f"{HEAD} when {{ context.now == 1 + 1 }};"),
        ("conditions.malformed", f"{HEAD} when {{ context.now == -1 }};"),
        ("conditions.type", f"{HEAD} when {{ principal in resource }};"),
        ("conditions.type", f"{HEAD} when {{ principal has device }};"),
        ("conditions.malformed", f'{HEAD} when {{ ip("10.0.0.1").isLoopback() }};'),
        ("conditions.malformed", f"{HEAD} when {{ [].contains(1) }};"),
        ("conditions.malformed", f'{HEAD} when {{ "\\n" == "a" }};'),
        ("conditions.malformed", f'{HEAD} when {{ "\\*" == "a" }};'),
        ("conditions.malformed", f'@id("a") {HEAD}; @id("a") {HEAD};'),
        ("conditions.malformed", f'@id("policy1") {HEAD}; {HEAD};'),
        ("conditions.malformed", f'@id("") {HEAD};'),
        ("conditions.malformed", f'@when("x") {HEAD};'),
        ("conditions.malformed", 'permit(principal, action == Moorline::Action::"delete", resource);'),
        ("conditions.malformed", 'permit(principal == Moorline::Service::"x", action, resource);'),
        ("conditions.malformed", 'permit(principal == Other::Device::"x", action, resource);'),
        ("conditions.malformed", f'{HEAD} when {{ principal.device == "\N{CYRILLIC SMALL LETTER A}" }};'),
        ("conditions.malformed", f"{HEAD}\N{NO-BREAK SPACE};"),
        ("conditions.malformed", f"{HEAD};\0"),
        ("conditions.malformed", f"{HEAD};\r\n"),
        ("conditions.malformed", f'{HEAD} when {{ principal.device == "a\nb" }};'),
        ("conditions.malformed", f"/* {HEAD} */"),
        ("conditions.type", f"{HEAD} when {{ principal.nothing == 1 }};"),
        ("conditions.type", f'{HEAD} when {{ context.now == "1" }};'),
        ("conditions.type", f"{HEAD} when {{ context.now }};"),
        ("conditions.type", f"{HEAD} when {{ principal == resource }};"),
        ("conditions.type", f"{HEAD} when {{ context == context }};"),
        ("conditions.type", f'{HEAD} when {{ ["a", 1].contains(1) }};'),
        ("conditions.type", f'{HEAD} when {{ if true then 1 else "a" }};'),
        ("conditions.type", f'{HEAD} when {{ resource.profiles like "a" }};'),
        ("conditions.type", f"{HEAD} when {{ principal.device.contains(1) }};"),
        ("conditions.type", f"{HEAD} when {{ true && 1 }};"),
        ("conditions.too_large", f"{HEAD};" + " " * 16 * 1024),
    ],
)
def test_what_makes_no_sense_never_enters(code, text):
    assert judged(text) == code


def test_sizes_are_bounded():
    """verifies that: policies, depth, elements and words have bounds, each met exactly by something that passes."""
    deep = "(" * (MAX_DEPTH - 1) + "true" + ")" * (MAX_DEPTH - 1)
    most = f"{HEAD} when {{ [{', '.join(['1'] * MAX_ELEMENTS)}].contains(1) }};"
    cases = [
        (f"{HEAD};" * MAX_POLICIES, f"{HEAD};" * (MAX_POLICIES + 1)),
        (f"{HEAD} when {{ {deep} }};", f"{HEAD} when {{ ({deep}) }};"),
        (most, most.replace("].", ", 1].")),
        (f"{HEAD} when {{ {'true&&' * 1900}true }};", f"{HEAD} when {{ {'true&&' * 2000}true }};"),
    ]
    for good, bad in cases:
        assert (judged(good), judged(bad)) == (None, "conditions.malformed")
    for hostile in (
        "(" * 16000,
        "[" * 16000,
        "!" * 16000,
        "@id(" * 4000,
        "if " * 5000,
        '"' * 16000,
        "//" * 8000,
        "a." * 8000,
    ):
        assert judged(hostile) == "conditions.malformed"
        assert judged(f"{HEAD} when {{ {hostile}"[: 16 * 1024]) == "conditions.malformed"


# Everything that is taken is taken by the engine too --------------------------------------------------------------------

strings = st.text(st.sampled_from('abz01 .*"\\-/'), max_size=5).map(
    lambda text: '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
)
longs = st.one_of(st.integers(0, 30), st.just((1 << 63) - 1)).map(str)


def attributes(wanted):
    words = {"Device": "principal", "Service": "resource", "Session": "context"}
    found = [f"{words[of]}.{name}" for of, names in ATTRIBUTES.items() for name, kind in names.items() if kind == wanted]
    return st.sampled_from(sorted(found))


@st.composite
def values(draw, kind, depth):
    if kind == "Bool":
        return draw(booleans(depth - 1))
    plain = {"String": strings, "Long": longs}[kind]
    if depth > 0 and draw(st.integers(0, 5)) == 0:
        one, other = draw(values(kind, depth - 1)), draw(values(kind, depth - 1))
        return f"(if {draw(booleans(depth - 1))} then {one} else {other})"
    return draw(st.one_of(plain, attributes(kind)))


@st.composite
def booleans(draw, depth):  # noqa: PLR0911 - one line a shape
    if depth <= 0:
        return draw(
            st.sampled_from(["true", "false", "context.post_quantum", '(principal == Moorline::Device::"d")', "(1 < 2)"])
        )
    kind = draw(st.sampled_from(["String", "Long", "Bool"]))
    shape = draw(st.integers(0, 7))
    if shape == 0:
        return f"!({draw(booleans(depth - 1))})"
    if shape in (1, 2):
        return f"({draw(booleans(depth - 1))} {('&&', '||')[shape - 1]} {draw(booleans(depth - 1))})"
    if shape == 3:
        return f"({draw(values(kind, depth))} {draw(st.sampled_from(['==', '!=']))} {draw(values(kind, depth))})"
    if shape == 4:
        return (
            f"({draw(values('Long', depth))} {draw(st.sampled_from(['<', '<=', '>', '>=']))} {draw(values('Long', depth))})"
        )
    if shape == 5:
        return f"({draw(values('String', depth))} like {draw(strings)})"
    elements = ", ".join(draw(st.lists(values(kind, depth - 1), min_size=1, max_size=3)))
    if shape == 6:
        return f"[{elements}].contains({draw(values(kind, depth - 1))})"
    return f"resource.profiles.containsAny([{draw(values('String', depth - 1))}])"


@st.composite
def policies(draw):
    found = []
    for index in range(draw(st.integers(1, 3))):
        clauses = "".join(
            f" {draw(st.sampled_from(['when', 'unless']))} {{ {draw(booleans(draw(st.integers(0, 3))))} }}"
            for _ in range(draw(st.integers(0, 2)))
        )
        principal = draw(
            st.sampled_from(["principal", "principal is Moorline::Device", 'principal == Moorline::Device::"x"'])
        )
        effect = draw(st.sampled_from(["permit", "forbid"]))
        found.append(f'@id("p{index}") {effect}({principal}, action, resource){clauses};')
    return "\n".join(found)


@settings(max_examples=150, deadline=None)
@given(text=policies())
def test_everything_the_grammar_makes_is_taken_by_both(text):
    """verifies that: well-typed conditions enter, and none of them makes the engine err."""
    assert judged(text) is None, text
    engine_takes(text)


@settings(max_examples=300, deadline=None)
@given(
    text=policies(),
    at=st.integers(0, 10_000),
    cut=st.integers(0, 3),
    put=st.sampled_from([*'"(){}[];.!=<&|a1*\\ ', "if ", "::"]),
)
@example(text=f"{HEAD};", at=0, cut=0, put="// ")
def test_what_is_taken_after_a_change_the_engine_takes_too(text, at, cut, put):
    """verifies that: there is no text that the ledger takes and the engine does not: engine and ledger never disagree."""
    at %= len(text)
    changed = text[:at] + put + text[at + cut :]
    if judged(changed) is None:
        engine_takes(changed)


PIECES = ['"', '""', '"a b"', '"\\n"', "\n", "//", "\\", "@", "id", "Action", "x", ";", "==", " ", HEAD, "when {", "}"]
WORDS = st.lists(st.sampled_from(PIECES))


@settings(max_examples=400, deadline=None)
@given(text=st.one_of(policies(), WORDS.map("".join)), quoted=WORDS.map("".join), at=st.integers(0, 400))
@example(text=f'{HEAD} when {{ "" == "x" }};', quoted="", at=0)
@example(text=f'{HEAD} when {{ "a" == "b" }};', quoted='"', at=len(HEAD) + 9)
def test_the_form_of_a_text_is_judged_as_the_text_is_word_by_word(text, quoted, at):
    """verifies that: with whatever quotes in it, a text judged by its form gives what reading each word of it gives."""
    for one in (text, text[:at] + quoted + text[at:]):
        try:
            expected = policies_in(one)
        except Malformed as error:
            expected = (error.code, error.got)
        try:
            found = require_valid(one, max_bytes=16 * 1024)
        except Malformed as error:
            found = (error.code, error.got)
        assert found == expected


@given(text=st.text(max_size=300))
def test_any_text_is_judged(text):
    assert judged(text) in (None, "conditions.malformed", "conditions.type", "conditions.too_large")
