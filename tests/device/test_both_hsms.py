"""Both parties' HSMs decide on every connection: each one's word binds, is about this connection, and is logged by both.

The attacker here is in turn the device, the function with its broker, and whoever recorded what an HSM signed before.
"""

import asyncio
import sys
import time
from dataclasses import replace

import pytest

from moorline.channel import device as channel
from moorline.channel import identity
from moorline.clock import Instant, SystemClock
from moorline.device.home import HttpsHome, connection_of
from moorline.errors import MoorlineError, Unavailable
from moorline.ledger import peers, records
from moorline.ledger.client import Endpoint
from moorline.ledger.records import ContractStatus, RevocationKind, Status
from moorline.verification.chains import verify_chain
from moorline.wire import cbor
from moorline.wire.access import AccessQuestion, Connection, Side, parse_statement, sign_statement

HomeAt = sys.modules["device_world"].HomeAt

UNTIL = "permit(principal, action, resource) when {{ context.now < {} }};"
NEVER = UNTIL.format(1)


async def refused(awaitable):
    with pytest.raises(MoorlineError) as caught:
        await awaitable
    return caught.value


async def until(condition):
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110 - what is waited for happens at the other end and has no event
            await asyncio.sleep(0.02)


def hsm_of(world, provider):
    return world.broker.hsm if provider == "alpha" else world.homes[f"{provider}.test"]


# Both decide, both log --------------------------------------------------------------------------------------------------


async def test_each_connection_is_decided_by_both_and_logged_by_both(running):
    async with await running.connect(running.device()) as connection:
        await connection.request(cbor.encode({"op": "list"}))
    both = [("home beta/hsm-1", True, "policy0"), ("function alpha/hsm-1", True, "policy0")]
    home, function = hsm_of(running, "beta"), hsm_of(running, "alpha")
    assert home.decisions() == function.decisions() == both
    assert [one["statement"] for one in home.entries] == [one["statement"] for one in function.entries]
    assert {one["binding"] for one in home.entries} == {one["binding"] for one in function.entries}
    assert len({one["binding"] for one in home.entries}) == 1


async def test_a_connection_judged_again_is_not_logged_again_until_a_decision_changes(make_world):
    world = make_world(max_age_s=2)
    world.hand_over()
    await world.start()
    try:
        connection = await world.connect(world.device())
        await connection.renew()
        await connection.renew()
        assert len(hsm_of(world, "beta").decisions()) == 2
        world.ledger.contract(conditions=NEVER)
        error = await refused(connection.renew())
        assert error.code == "access.refused_by_home"
        for provider in ("beta", "alpha"):
            assert hsm_of(world, provider).decisions()[2:] == [
                ("home beta/hsm-1", False, "no rule permits"),
                ("function alpha/hsm-1", False, "no rule permits"),
            ]
        await connection.aclose()
    finally:
        await world.stop()


async def test_a_refusal_names_whose_hsm_and_which_rule(running):
    running.ledger.contract(
        conditions='permit(principal, action, resource); @id("no-phones") forbid(principal, action, resource) '
        'when { principal.device like "phone-*" };'
    )
    phone = running.device(name="phone-1")
    error = await refused(running.connect(phone))
    assert (error.code, error.got) == ("access.refused_by_home", "no-phones")
    assert "beta" in error.says
    async with await running.connect(running.device(name="tablet-1", directory="control", serial=502)):
        pass


@pytest.mark.parametrize("before", [None, ContractStatus.OFFERED])
async def test_a_contract_accepted_after_a_refusal_is_proven_to_the_next_device(world, before):
    """verifies that: what the function told the refused one of its standing is not told to the one that is let in."""
    if before is None:
        del world.ledger.values[records.contract_key("c1")]
    else:
        world.ledger.contract(status=before)
    world.hand_over()
    await world.start()
    try:
        error = await refused(world.connect(world.device()))
        assert (error.code, error.got) == ("access.refused_by_home", "ledger.contract_not_active")
        world.ledger.contract()
        async with await world.connect(world.device()):
            pass
    finally:
        await world.stop()


# The session's facts ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("conditions", "allowed"),
    [
        ('permit(principal, action, resource) when { context.profile == "tls" };', True),
        ('permit(principal, action, resource) when { context.profile == "no-pfs" };', False),
        ("permit(principal, action, resource) when { context.post_quantum };", True),
        ("permit(principal, action, resource) when { !context.post_quantum };", False),
    ],
)
async def test_conditions_ask_about_the_session_as_it_is(running, conditions, allowed):
    """verifies that: profile and key agreement in the facts are those of the TLS session that really is there."""
    running.ledger.contract(conditions=conditions)
    if allowed:
        async with await running.connect(running.device()) as connection:
            assert connection._stream.group.upper() == "X25519MLKEM768"
    else:
        assert (await refused(running.connect(running.device()))).code == "access.refused_by_home"


async def test_a_session_without_the_hybrid_is_told_apart(running, monkeypatch):
    """verifies that: the same device, which will not do ML-KEM, is let in by a contract unless that asks for it."""
    made = identity.of_client

    def classical(own):
        context = made(own)
        assert identity.SSL._lib.SSL_CTX_set1_curves_list(context._context, b"X25519") == 1
        return context

    monkeypatch.setattr(identity, "of_client", classical)
    async with await running.connect(running.device()) as connection:
        assert connection._stream.group.upper() == "X25519"
    running.ledger.contract(conditions="permit(principal, action, resource) when { context.post_quantum };")
    assert (await refused(running.connect(running.device()))).code == "access.refused_by_home"


async def test_a_contract_for_the_other_profile_only_lets_no_tls_device_in(running):
    running.ledger.contract(profiles=("no-pfs",))
    error = await refused(running.connect(running.device()))
    assert (error.code, error.got) == ("access.refused_by_home", "access.profile")


# One side says no -------------------------------------------------------------------------------------------------------


class Ahead:
    """A clock some seconds ahead, within what two HSMs' clocks may differ."""

    def __init__(self, seconds):
        self.seconds = seconds

    def now(self):
        return Instant(SystemClock().now() + self.seconds)


@pytest.fixture
def ending(running):
    """A contract that ends in a minute, by the clock of beta's HSM; by that of alpha's it has ended already."""
    running.ledger.contract(conditions=UNTIL.format(int(time.time()) + 10))
    running.broker.hsm.clock = Ahead(20)
    return running


async def test_the_no_of_the_functions_hsm_stops_what_the_home_allows(ending):
    error = await refused(ending.connect(ending.device()))
    assert (error.code, error.got) == ("access.refused_by_function", "no rule permits")
    both = [("home beta/hsm-1", True, "policy0"), ("function alpha/hsm-1", False, "no rule permits")]
    assert hsm_of(ending, "beta").decisions() == hsm_of(ending, "alpha").decisions() == both
    ending.broker.hsm.clock = SystemClock()
    async with await ending.connect(ending.device()):
        pass  # the control: both clocks right, the same contract


async def test_a_broker_that_ignores_its_own_refusal_gains_no_device(ending, monkeypatch):
    """verifies that: the function is told yes and goes on; the device wants that HSM's signature under a yes."""
    told_yes(ending, monkeypatch)
    assert (await refused(ending.connect(ending.device()))).code == "access.refused_by_function"
    assert hsm_of(ending, "beta").decisions()[-1] == ("function alpha/hsm-1", False, "no rule permits")


async def test_a_broker_that_ignores_the_homes_refusal_serves_nobody(running, monkeypatch):
    """verifies that: a device that judges nothing brings its home's no to a function whose broker calls it a yes."""
    running.ledger.contract(conditions=NEVER)
    told_yes(running, monkeypatch)
    assert (await refused(trusting(running, ask=running.home(running.device()).ask))).code == "access.refused_by_home"


async def test_a_device_that_ignores_its_homes_refusal_is_refused_by_the_function(running):
    running.ledger.contract(conditions=NEVER)
    error = await refused(trusting(running, ask=running.home(running.device()).ask))
    assert error.code == "workload.device_not_authorised"
    assert "home" in error.says
    assert hsm_of(running, "alpha").decisions()[0] == ("home beta/hsm-1", False, "no rule permits")


def told_yes(world, monkeypatch):
    real = world.broker.authorised

    async def lying(claim, call):
        return replace(await real(claim, call), allowed=True, refused_by="", rule="never mind")

    monkeypatch.setattr(world.broker, "authorised", lying)


async def trusting(world, *, ask, store=None):
    """A device that takes whatever the function sends, and asks it something."""
    store = store or world.device()
    own = chain_of(store, store.identity().chain)

    async def bundle():
        return world.ledger.bundle(peers.device_keys(own))

    async def ask_home(peer, secured):
        asked = connection_of(own, peer, secured, provider="alpha", service="records", contract="c1")
        return await ask(AccessQuestion(connection=asked))

    async def judge(_peer, _status, _secured):
        return None

    connection = await channel.connect(
        world.inbound,
        identity=store.identity(),
        roots=store.trust().roots,
        clock=SystemClock(),
        bundle=bundle,
        ask_home=ask_home,
        judge=judge,
        max_age_s=30,
    )
    async with connection:
        return cbor.decode(await connection.request(cbor.encode({"op": "list"})))


def chain_of(store, certificates):
    return verify_chain(certificates[0], certificates[1:], store.trust().roots, SystemClock().now())


# Statements that are not about this connection, or not by that HSM ------------------------------------------------------


def remade(world, *, by="beta", **changes):
    """A home's statement with other fields, signed again by the HSM of `by`: what somebody with that HSM could make."""
    signer = hsm_of(world, by).identity.signer

    def change(data):
        made = parse_statement(data)
        inner = {name: changes.pop(name) for name in list(changes) if name in Connection.__dataclass_fields__}
        return sign_statement(replace(made, **changes, connection=replace(made.connection, **inner)), signer)

    return change


OTHER = "access.other_connection"
CHANGED = {
    "nothing at all": (lambda _: lambda _data: b"", "access.no_home_statement"),
    "garbage": (lambda _: lambda _data: b"\xd2garbage", "cbor.undecodable"),
    "a flipped bit": (lambda _: lambda data: data[:-1] + bytes([data[-1] ^ 1]), "signature.invalid"),
    "another TLS session": (lambda w: remade(w, binding=bytes(32)), OTHER),
    "another function": (lambda w: remade(w, function="spiffe://alpha.test/svc/records/i-2"), OTHER),
    "another service": (lambda w: remade(w, service="others"), OTHER),
    "another device": (lambda w: remade(w, device="spiffe://beta.test/device/d-2"), OTHER),
    "another profile": (lambda w: remade(w, profile="no-pfs"), OTHER),
    "a session without the hybrid": (lambda w: remade(w, post_quantum=False), OTHER),
    "a contract not configured": (lambda w: remade(w, contract="c2"), "workload.device_not_authorised"),
    "another provider's HSM": (lambda w: remade(w, by="gamma"), "cose.key_id"),
    "another provider's HSM, which says so": (lambda w: remade(w, by="gamma", provider="gamma"), "ledger.not_proven"),
    "an HSM that is not there": (lambda w: remade(w, hsm="hsm-9"), "ledger.hsm_not_active"),
    "the other side": (lambda w: remade(w, side=Side.FUNCTION), "access.other_speaker"),
    "another ledger": (lambda w: remade(w, ledger_id=bytes(32)), "access.other_speaker"),
    "long ago": (lambda w: remade(w, issued=int(time.time()) - 60), "access.stale"),
    "past its end": (lambda w: remade(w, not_after=int(time.time()) - 1), "access.stale"),
    "the future": (lambda w: remade(w, issued=int(time.time()) + 600), "access.stale"),
    "an answer to something": (lambda w: remade(w, answers=b"a" * 32), "access.answers_another"),
}


@pytest.mark.parametrize("case", CHANGED)
async def test_a_function_takes_only_the_homes_word_about_this_connection(running, case):
    make, code = CHANGED[case]
    change = make(running)
    home = running.home(running.device())

    async def ask(question):
        return change(await home.ask(question))

    error = await refused(trusting(running, ask=ask))
    assert error.code == code
    assert await trusting(running, ask=home.ask) == {"names": []}  # the control


async def test_a_statement_cannot_be_used_for_a_second_connection(running):
    """verifies that: the very bytes that opened one connection open no other, not even of the same device."""
    home, kept = running.home(running.device()), []

    async def keep(question):
        kept.append(await home.ask(question))
        return kept[-1]

    async def replay(_question):
        return kept[0]

    assert await trusting(running, ask=keep) == {"names": []}
    error = await refused(trusting(running, ask=replay))
    assert (error.code, error.got) == (OTHER, "binding")


ANSWERS = {
    "nothing": (lambda _w, _data: b"", "cose.not_sign1"),
    "the home's own word sent back": (lambda w, _data: w.sent[-1], "cose.key_id"),
    "our HSM's word as if it were the home's": (lambda w, data: answered(w, data, side=Side.HOME), "access.other_speaker"),
    "an answer to another statement": (lambda w, data: answered(w, data, answers=bytes(32)), "access.answers_another"),
    "an answer about another connection": (lambda w, data: answered(w, data, binding=bytes(32)), OTHER),
    "an answer of another provider's HSM": (lambda w, data: answered(w, data, by="gamma"), "cose.key_id"),
    "an old answer": (lambda w, data: answered(w, data, issued=int(time.time()) - 60), "access.stale"),
    "a no": (lambda w, data: answered(w, data, allowed=False, rule="no"), "access.refused_by_function"),
}


def answered(world, data, *, by="alpha", **changes):
    return remade(world, by=by, **changes)(data)


@pytest.mark.parametrize("case", ANSWERS)
async def test_a_device_takes_only_the_answer_of_the_functions_hsm_to_its_own(running, monkeypatch, case):
    make, code = ANSWERS[case]
    real = running.broker.authorised

    async def other(claim, call):
        running.sent = [call.home]
        reply = await real(claim, call)
        return replace(reply, statement=make(running, reply.statement))

    monkeypatch.setattr(running.broker, "authorised", other)
    assert (await refused(running.connect(running.device()))).code == code
    monkeypatch.setattr(running.broker, "authorised", real)
    async with await running.connect(running.device()):
        pass  # the control


# Time, withdrawal, absence ----------------------------------------------------------------------------------------------


async def test_a_contract_that_ends_ends_its_connections_at_the_next_judgement(make_world):
    world = make_world(max_age_s=2)
    world.hand_over()
    await world.start()
    try:
        world.ledger.contract(conditions=UNTIL.format(int(time.time()) + 3))
        connection = await world.connect(world.device())
        await until(lambda: connection.closed)
        assert (await refused(connection.request(b""))).code == "access.refused_by_home"
    finally:
        await world.stop()


async def test_a_withdrawn_contract_ends_its_connections_at_the_next_judgement(make_world):
    """verifies that: nobody asks for it: the renewal after half a max_age finds the contract gone."""
    world = make_world(max_age_s=2)
    world.hand_over()
    await world.start()
    try:
        connection = await world.connect(world.device())
        world.ledger.contract(status=ContractStatus.WITHDRAWN)
        await until(lambda: connection.closed)
        error = await refused(connection.request(b""))
        assert (error.code, error.got) == ("access.refused_by_home", "ledger.contract_not_active")
    finally:
        await world.stop()


async def test_without_its_home_hsm_a_device_opens_nothing_new_and_is_told_when_to_ask_again(running):
    hsm_of(running, "beta").away = True
    error = await refused(running.connect(running.device()))
    assert (error.code, error.retry_after_s) == ("access.home_unavailable", 5)
    assert isinstance(error, Unavailable)
    assert hsm_of(running, "alpha").decisions() == []


async def test_the_home_hsm_over_https_that_nobody_answers_for(running):
    """verifies that: the real client says the same, with the address it tried."""
    store = running.device()
    store.keep_home(Endpoint(url="https://127.0.0.1:1", server_name="hsm-1.hsm.beta.test"))
    error = await refused(running.connect(store, home=HttpsHome.of(store)))
    assert (error.code, error.expected) == ("access.home_unavailable", "https://127.0.0.1:1")
    assert error.retry_after_s >= 5


async def test_an_open_connection_outlives_its_home_hsm_by_the_last_statement_only(make_world):
    world = make_world(max_age_s=4)
    world.hand_over()
    await world.start()
    try:
        connection = await world.connect(world.device())
        hsm_of(world, "beta").away = True
        await connection.renew()  # under the statement that is kept
        assert cbor.decode(await connection.request(cbor.encode({"op": "list"}))) == {"names": []}
        await until(lambda: connection.closed)
        error = await refused(connection.request(b""))
        assert error.code in {"access.home_unavailable", "access.stale"}
    finally:
        await world.stop()


# The home HSM and devices that lie to it --------------------------------------------------------------------------------


async def a_question(world, **changes):
    made = Connection(
        device="spiffe://beta.test/device/d-1",
        device_provider="beta",
        function="spiffe://alpha.test/svc/records/i-1",
        function_provider="alpha",
        service="records",
        contract="c1",
        profile="tls",
        post_quantum=True,
        binding=b"b" * 32,
    )
    return AccessQuestion(connection=replace(made, **changes))


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"device": "spiffe://beta.test/device/d-2"}, "access.other_device"),
        ({"device_provider": "gamma"}, "access.other_device"),
        ({"contract": "../c1"}, "name.malformed"),
        ({"function_provider": "Alpha"}, "name.malformed"),
    ],
)
async def test_a_home_says_nothing_about_what_is_not_its_devices(world, changes, code):
    home = HomeAt(world.homes["beta.test"], "spiffe://beta.test/device/d-1")
    assert (await refused(home.ask(await a_question(world, **changes)))).code == code
    assert world.homes["beta.test"].entries == []


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        (lambda w: w.ledger.revoke(RevocationKind.DEVICE, "beta", "d-1"), "ledger.revoked"),
        (lambda w: w.ledger.service(status=Status.REMOVED), "ledger.service_not_active"),
        (lambda w: w.ledger.contract(status=ContractStatus.OFFERED), "ledger.contract_not_active"),
        (lambda w: w.ledger.contract(grantee="gamma"), "ledger.contract_other"),
        (lambda w: w.ledger.values.pop(records.contract_key("c1")), "ledger.contract_not_active"),
    ],
)
async def test_a_home_signs_its_no_with_what_the_ledger_says(world, change, rule):
    change(world)
    home = HomeAt(world.homes["beta.test"], "spiffe://beta.test/device/d-1")
    said = parse_statement(await home.ask(await a_question(world)))
    assert (said.allowed, said.rule, said.side) == (False, rule, Side.HOME)
    assert world.homes["beta.test"].decisions() == [("home beta/hsm-1", False, rule)]


async def test_a_home_logs_only_an_answer_to_what_it_said(running):
    """verifies that: a device cannot write into its home's log what no HSM of a function said."""
    home = running.home(running.device())
    told = []

    async def tell(answer):
        told.append(answer)
        await type(home).tell(home, answer)

    home.tell = tell
    async with await running.connect(running.device(), home=home):
        pass
    (answer,) = told
    hsm = hsm_of(running, "beta")
    before = len(hsm.entries)
    forged = sign_statement(replace(parse_statement(answer.function), allowed=False), hsm.identity.signer)
    for odd, code in (
        (replace(answer, function=forged), "cose.key_id"),
        (replace(answer, function=answer.home), "access.other_speaker"),
        (replace(answer, home=answer.function), "access.other_speaker"),
        (replace(answer, home=remade(running, by="alpha")(answer.home)), "cose.key_id"),
        (replace(answer, home=remade(running, rule="another")(answer.home)), "access.answers_another"),
    ):
        assert (await refused(home.tell(odd))).code in {code, "ledger.not_proven"}
    stranger = HomeAt(hsm, "spiffe://beta.test/device/d-2")
    assert (await refused(stranger.tell(answer))).code == "access.other_device"
    assert len(hsm.entries) == before
