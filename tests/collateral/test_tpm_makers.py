"""Lists of TPM makers from a local server: good, slow, wrong, stale, absent; and addresses that nobody should be sent to."""

import pytest
from cryptography.hazmat.primitives.serialization import Encoding
from tpm_maker import TpmMaker

from moorline.cli import run as moor
from moorline.clock import Instant, rendered
from moorline.endorsers.collecting import collect
from moorline.endorsers.pacing import Pacing
from moorline.endorsers.tpm_makers import Door, TpmMakers, is_public
from moorline.endorsers.transport import Limits, Surroundings
from moorline.storage.collateral_intake import Taken, tpm_crls
from moorline.storage.collateral_store import open_collateral
from moorline.verification.anchors import AnchorSet
from moorline.verification.collateral_judging import Anchors
from moorline.verification.intel_pck import IntelAnchors
from moorline.verification.tpm_identity import endorsement_path, revoked_above
from moorline.verification.tpm_revocation import list_points

NOW = Instant(1_800_000_000)
PATIENT = Pacing(interval_s=0.0, attempts=4, base_s=2.0, cap_s=60.0, longest_wait_s=120.0)
HASTY = Pacing(interval_s=0.0, attempts=2, base_s=0.0, cap_s=0.0, longest_wait_s=0.0)


class Clock:
    """Time that moves only when somebody sleeps."""

    at = 1000.0

    def now(self):
        return NOW

    def monotonic(self):
        return self.at

    async def sleep(self, seconds):
        self.at += seconds

    def around(self):
        return Surroundings(clock=self, monotonic=self.monotonic, sleep=self.sleep, jitter=lambda: 0.5)


@pytest.fixture
def maker(vendor, tools):
    made = TpmMaker(NOW, where=vendor.url)
    vendor.replies |= {f"/{name}.crl": tools.Reply(body=made.crl(name)) for name in ("root", "ca")}
    return made


@pytest.fixture
def store(tmp_path):
    return open_collateral(tmp_path / "collateral", create=True)


def points_of(maker):
    return list_points(endorsement_path(maker.brought, anchors=maker.anchors))


def client(maker, *, private=True, pacing=PATIENT, **door):
    return TpmMakers(points_of(maker), door=Door(private=private, **door), surroundings=Clock().around(), pacing=pacing)


async def fetched(maker, store, **how):
    """What becomes of each list, by the path at which it is."""
    makers, clock = client(maker, **how), Clock()
    anchors = Anchors(snp=AnchorSet(snp=()), intel=IntelAnchors(anchors=()), tpm=maker.anchors)
    outcomes = await collect(makers.names, makers, store, anchors=anchors, clock=clock, told=lambda _: None)
    return {makers._points[one.name].urls[0].rpartition("/")[2]: one for one in outcomes}


def codes(outcomes):
    return {path: None if one.error is None else one.error.code for path, one in outcomes.items()}


async def test_the_lists_above_a_tpm_are_fetched_judged_and_revoke(vendor, tools, maker, store):
    """verifies that: each authority's list is asked for where the certificate below it says, once, and stored; the list
    with the TPM's authority in it then revokes the TPM; one that is older than what is held is refused."""
    found = await fetched(maker, store)
    assert codes(found) == {"root.crl": None, "ca.crl": None}
    assert sorted(vendor.requests) == ["/ca.crl", "/root.crl"]
    assert revoked_above(maker.brought, anchors=maker.anchors, crls=tpm_crls(store)) is False
    vendor.replies["/ca.crl"] = tools.Reply(body=maker.crl("ca", maker.die, number=6, start=-0.5))
    found = await fetched(maker, store)
    assert {path: one.taken for path, one in found.items()} == {"root.crl": Taken.UNCHANGED, "ca.crl": Taken.STORED}
    assert revoked_above(maker.brought, anchors=maker.anchors, crls=tpm_crls(store)) is True
    vendor.replies["/ca.crl"] = tools.Reply(body=maker.crl("ca"))
    assert codes(await fetched(maker, store))["ca.crl"] == "collateral.rollback"
    assert revoked_above(maker.brought, anchors=maker.anchors, crls=tpm_crls(store)) is True


BAD = {
    "absent": (lambda maker, reply: reply(status=404), "endorser.not_found"),
    "gone": (lambda maker, reply: reply(status=410), "endorser.gone"),
    "broken": (lambda maker, reply: reply(status=500), "endorser.unavailable"),
    "a web page": (lambda maker, reply: reply(body=b"<html>maintenance</html>"), "ek.crl_malformed"),
    "a redirect": (lambda maker, reply: reply(status=302, headers={"Location": "/root.crl"}), "endorser.answer_malformed"),
    "cut": (lambda maker, reply: reply(body=maker.crl("ca"), cut=True), "endorser.unreachable"),
    "too large": (lambda maker, reply: reply(body=bytes((4 << 20) + 1)), "endorser.answer_too_large"),
    "another authority's": (lambda maker, reply: reply(body=maker.crl("root")), "ek.crl_signature"),
    "forged": (lambda maker, reply: reply(body=maker.crl("ca", key=maker.keys["die"])), "ek.crl_signature"),
    "stale": (lambda maker, reply: reply(body=maker.crl("ca", start=-9, end=-8)), "ek.crl_stale"),
    "of the future": (lambda maker, reply: reply(body=maker.crl("ca", start=5, end=9)), "ek.crl_not_yet_valid"),
}


@pytest.mark.parametrize("what", BAD)
async def test_a_bad_answer_is_said_and_stores_nothing(vendor, tools, maker, store, what):
    """verifies that: whatever is wrong with one list is its outcome; the other list is stored all the same."""
    make, code = BAD[what]
    vendor.replies["/ca.crl"] = make(maker, tools.Reply)
    assert codes(await fetched(maker, store)) == {"root.crl": None, "ca.crl": code}
    assert len(store.names()) == 1


@pytest.mark.parametrize("how", [{"hang": True}, {"drip_s": 0.2}])
async def test_a_server_that_is_slow_is_one_that_does_not_answer(vendor, tools, maker, store, how, monkeypatch):
    vendor.replies["/ca.crl"] = tools.Reply(body=maker.crl("ca"), **how)
    limits = Limits(answer_cap=4 << 20, deadline_s=0.4)
    monkeypatch.setattr("moorline.endorsers.tpm_makers.Limits", lambda answer_cap: limits)
    assert codes(await fetched(maker, store, pacing=HASTY)) == {"root.crl": None, "ca.crl": "endorser.timeout"}


# Where a certificate may send this machine ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "addresses",
    [
        ("127.0.0.1",),
        ("10.1.2.3",),
        ("169.254.169.254",),
        ("::1",),
        ("fe80::1",),
        ("::ffff:192.168.0.1",),
        ("64:ff9b::7f00:1",),
        ("2002:7f00:1::",),
        ("93.184.216.34", "127.0.0.1"),
        ("not an address",),
        (),
    ],
)
async def test_a_certificate_does_not_make_this_machine_ask_its_neighbours(vendor, maker, store, addresses):
    """verifies that: a name that leads to a private address, or to one among public ones, is not asked at all; where the
    operator allows it the same name is."""

    async def lookup(host, port):
        return addresses

    maker.where = "http://lists.maker.test"
    maker.ca, maker.die = maker.certificate("ca", "root", lists=True), maker.certificate("die", "ca", lists=True)
    maker.ek = maker.certificate("", "die")
    found = await fetched(maker, store, private=False, lookup=lookup)
    assert set(codes(found).values()) == {"endorser.private_address"}
    assert vendor.requests == []


async def test_the_name_is_looked_up_once_and_that_address_is_asked(vendor, maker, store):
    """verifies that: what is connected to is what was judged, under the name that the certificate has; a second answer of
    the name server leads nowhere."""
    port, asked = vendor.server.server_port, []

    async def lookup(host, at):
        asked.append((host, at))
        return ("127.0.0.1",)

    maker.where = f"http://lists.maker.test:{port}"
    maker.ca, maker.die = maker.certificate("ca", "root", lists=True), maker.certificate("die", "ca", lists=True)
    maker.ek = maker.certificate("", "die")
    assert set(codes(await fetched(maker, store, lookup=lookup)).values()) == {None}
    assert asked == [("lists.maker.test", port)] * 2
    assert set(vendor.hosts) == {f"lists.maker.test:{port}"}


@pytest.mark.parametrize(
    "where",
    [
        "https://maker.test",
        "ldap://maker.test",
        "file:///etc",
        "http://user@maker.test",
        "http://maker.test:22",
        "http:///x",
    ],
)
async def test_only_plain_http_at_its_own_port_is_asked(vendor, maker, store, where):
    maker.where = where
    maker.ca, maker.die = maker.certificate("ca", "root", lists=True), maker.certificate("die", "ca", lists=True)
    maker.ek = maker.certificate("", "die")

    async def lookup(host, port):
        raise AssertionError(host)

    found = await fetched(maker, store, private=False, lookup=lookup)
    assert set(codes(found).values()) == {"endorser.no_list_address"}


def test_public_addresses_are_public():
    assert all(map(is_public, ("93.184.216.34", "2606:2800:220:1::1")))
    assert not any(map(is_public, ("224.0.0.1", "0.0.0.0", "100.64.0.1", "ff02::1", "fd00::1", "fe80::1%eth0", "")))


async def test_a_name_that_is_not_known_is_no_answer(maker, store):
    async def lookup(host, port):
        raise OSError("Name or service not known")

    assert set(codes(await fetched(maker, store, lookup=lookup, pacing=HASTY)).values()) == {"endorser.unreachable"}


async def test_a_tpm_that_leads_to_no_anchor_sends_nobody_anywhere(maker):
    """verifies that: addresses count in certificates of a verified path only."""
    other = TpmMaker(NOW, where="http://127.0.0.1:9")
    assert endorsement_path(other.brought, anchors=maker.anchors) is None
    crossed = (other.brought[0], maker.brought[1])
    assert endorsement_path(crossed, anchors=maker.anchors) is None


# The command ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def fetch(maker, tmp_path, capsys):
    """`moor collateral fetch` for a TPM of a maker, judged by the root of another or the same: code, and what was said."""

    def fetched(whose, *more, root=None):
        pem = Encoding.PEM
        (tmp_path / "root.pem").write_bytes((root or whose).root.public_bytes(pem))
        chain = (whose.ek, whose.die, whose.ca)
        (tmp_path / "chain.pem").write_bytes(b"".join(one.public_bytes(pem) for one in chain))
        files = ("--tpm-chain", tmp_path / "chain.pem", "--tpm-root", tmp_path / "root.pem", "--store", tmp_path / "c")
        code = moor(["collateral", "fetch", *map(str, files), "--at", rendered(NOW), "--pace", "0", *more])
        said = capsys.readouterr()
        return code, said.out + said.err

    return fetched


def test_the_command_fetches_the_lists_of_a_chain(vendor, maker, fetch):
    """verifies that: another port and a private address are refused unless they are allowed; then both lists are stored; a
    chain that leads to no named root is refused with what to do."""
    code, said = fetch(maker)
    assert (code, said.count("endorser.no_list_address")) == (2, 2)
    code, said = fetch(TpmMaker(NOW, where="http://127.0.0.1"))
    assert (code, said.count("endorser.private_address")) == (1, 2)
    assert vendor.requests == []
    code, said = fetch(maker, root=TpmMaker(NOW))
    assert (code, "ek.anchor_unknown" in said, "--tpm-root" in said) == (1, True, True)
    code, said = fetch(maker, "--allow-private")
    assert (code, said.count("stored")) == (0, 2), said
