"""Server-sent events: a reader that was cut off goes on where it was, without loss or duplicates."""

import asyncio
import json
import ssl
import sys
from subprocess import PIPE

import httpx
import pytest
from test_service import PKI, by_chain_alone, client, configured, serving, silicon  # noqa: F401 - fixtures

from moorline.clock import Instant, SystemClock
from moorline.errors import Conflict, Malformed, NotAuthentic, Refused
from moorline.rats import EvidenceRoot
from moorline.services import http, verifier_events
from moorline.storage.verifier_rounds import EnrolledHost, StoredResult
from moorline.storage.verifier_store import VerifierStore
from moorline.wire.http import load_identity

NOW = SystemClock().now()
OPERATOR = "spiffe://alpha.test/operator/ann"


def change(store, count):
    """`count` changes of h1's verdict: gained, lost, gained ..."""
    for _ in range(count):
        if store.newest_event() % 2:
            store.withdraw("h1", "ima.unknown_file", at=NOW)
        else:
            standing = StoredResult(
                host="h1", ear="", status="affirming", code=None, issued=NOW, expires=Instant(NOW + 600), withdrawn=None
            )
            store.put_result(standing, patience_until=Instant(0))


@pytest.fixture
def store(configured):  # noqa: F811
    opened = VerifierStore.open(configured.database)
    opened.enrol(EnrolledHost(host="h1", ek_digest=b"e", ak_public=b"", root=EvidenceRoot.TEST, enrolled=NOW))
    return opened


async def stream(address, *, headers=None, until, uri=OPERATOR, path="/v1/events/stream"):
    """What an SSE client sees until `until` events came or the stream ended: (id, event, data) and how it ended."""
    context = ssl.create_default_context(cadata=PKI.roots_pem.decode())
    identity = PKI.identity(uri)
    load_identity(context, identity.certificate_chain_pem, identity.private_key_pem)
    found, one = [], {}
    async with (
        httpx.AsyncClient(verify=context, timeout=20) as reader,
        reader.stream(
            "GET", f"https://{address}{path}", headers=headers, extensions={"sni_hostname": "v1.verifier.alpha.test"}
        ) as answer,
    ):
        assert answer.headers["content-type"].startswith("text/event-stream")
        async for line in answer.aiter_lines():
            name, _, value = line.partition(": ")
            if line == "" and "id" in one:
                found.append((int(one["id"]), one["event"], json.loads(one["data"])))
                one = {}
                if len(found) == until:
                    return found
            elif name:
                one[name] = value
    return found


async def test_a_reader_that_was_cut_off_goes_on_where_it_was(serving, store):  # noqa: F811
    """verifies that: Last-Event-ID resumes, `after` begins, and every event comes once and in order."""
    change(store, 5)
    first = await stream(serving, until=3)
    change(store, 4)
    rest = await stream(serving, headers={"last-event-id": str(first[-1][0])}, until=6)
    assert [one[0] for one in first + rest] == list(range(1, 10))
    assert [one[1] for one in first] == ["verdict_gained", "verdict_lost", "verdict_gained"]
    assert first[1][2]["code"] == "ima.unknown_file"
    assert (await stream(serving, path="/v1/events/stream?after=8", until=1))[0][0] == 9


async def test_an_event_is_heard_while_the_stream_is_open(configured, world):  # noqa: F811
    """verifies that: a change that this process makes is sent to open streams at once, and a stream ends by itself."""
    from test_service import composed, trust

    from moorline.services import verifier_anchors

    anchors = verifier_anchors.read_anchors(configured, trust())
    authority = composed(configured, world, anchors)
    store = VerifierStore.open(configured.database)
    store.enrol(EnrolledHost(host="h1", ek_digest=b"e", ak_public=b"", root=EvidenceRoot.TEST, enrolled=NOW))
    app = http.application("events alone", streams={verifier_events.STREAM_PATH: 60.0})
    verifier_events.add_routes(app, authority, trust_domain="alpha.test", guard=by_chain_alone, stream_s=2.0)
    bound = asyncio.get_running_loop().create_future()
    shown = http.TlsIdentity(chain_pem=configured.identity_chain.read_bytes(), key_pem=configured.identity_key.read_bytes())
    task = asyncio.create_task(
        http.serve(app, listen="127.0.0.1:0", identity=shown, client_roots_pem=PKI.roots_pem, ready=bound.set_result)
    )
    address = await bound
    reader = asyncio.create_task(stream(address, until=99))
    await asyncio.sleep(0.3)
    change(store, 1)
    authority.tell_readers()
    assert [one[0] for one in await reader] == [1]
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_streams_are_for_those_who_act_on_verdicts(serving, store):  # noqa: F811
    for uri, kind in (
        ("spiffe://beta.test/operator/ann", Refused),
        ("spiffe://alpha.test/host/h1", Refused),
        (None, NotAuthentic),
    ):
        async with client(serving, uri) as session:
            with pytest.raises(kind):
                await session.get_bytes("/v1/events/stream")


@pytest.mark.parametrize("last", ["-1", "x", "1e3", "9" * 20, "", "٣".encode()])
async def test_an_odd_cursor_is_malformed(serving, store, last):  # noqa: F811
    async with client(serving, OPERATOR) as session:
        with pytest.raises(Malformed) as refused:
            await session.send("GET", "/v1/events/stream", headers={"last-event-id": last})
        assert refused.value.code == "events.request"


async def test_a_cursor_of_the_future_is_refused_before_the_stream_begins(serving, store):  # noqa: F811
    async with client(serving, OPERATOR) as session:
        with pytest.raises(Conflict) as refused:
            await session.get_bytes("/v1/events/stream", {"after": "3"})
        assert refused.value.code == "events.cursor_unknown"


async def test_the_command_line_shows_events_and_where_to_go_on(serving, store, tmp_path):  # noqa: F811
    """verifies that: a page for people, lines for programs, and a wrong address or nobody there is told from a no."""
    change(store, 3)
    identity = PKI.identity(OPERATOR)
    (tmp_path / "ann.pem").write_bytes(identity.certificate_chain_pem)
    (tmp_path / "ann.key").write_bytes(identity.private_key_pem)
    (tmp_path / "r.pem").write_bytes(PKI.roots_pem)
    named = 'roots = "r.pem"\ncertificate_chain = "ann.pem"\nprivate_key = "ann.key"\n'
    (tmp_path / "operator.toml").write_text(named, "utf-8")

    async def moor(at, *words):
        command = [sys.executable, "-m", "moorline.cli", "verifier", "events", "--at", at]
        child = await asyncio.create_subprocess_exec(
            *command, "--as", str(tmp_path / "operator.toml"), *words, stdout=PIPE, stderr=PIPE
        )
        out, err = await child.communicate()
        return child.returncode, out.decode(), err.decode()

    where = f"https://{serving}|v1.verifier.alpha.test"
    code, out, _ = await moor(where, "--after", "1")
    assert (code, out.count("verdict_"), "next: moor verifier events --after 3" in out) == (0, 2, True)
    code, out, _ = await moor(where, "--json")
    assert [json.loads(line)["cursor"] for line in out.splitlines()] == [1, 2, 3]
    code, _, err = await moor(where, "--after", "9")
    assert (code, "events.cursor_unknown" in err) == (1, True)
    code, _, err = await moor("https://127.0.0.1:1|v1.verifier.alpha.test")
    assert (code, "peer.unreachable" in err) == (2, True)
    code, _, err = await moor("127.0.0.1:1")
    assert (code, "cli.verifier_address" in err) == (2, True)
