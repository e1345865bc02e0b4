"""Two brokers over a real ledger: enrolment with curl and openssl, peers, signatures, strangers at every port."""

from __future__ import annotations

import asyncio
import base64
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from moorline.clock import SystemClock
from moorline.errors import MoorlineError, Refused
from moorline.hsm.exchange import BUNDLE_PURPOSE, TrustBundle
from moorline.ledger import records
from moorline.ledger import transactions as tx
from moorline.ledger.light_client import verify_bundle
from moorline.verification.chains import verify_chain
from moorline.wire import cose, keys, pair, schema
from moorline.wire.certificates import spiffe_id_of
from moorline.wire.http import ClientIdentity

sys.path.insert(0, str(Path(__file__).parent))
from consortium import Consortium

OPENSSL_P7 = ("openssl", "pkcs7", "-inform", "DER", "-print_certs")
pytestmark = [pytest.mark.story, pytest.mark.asyncio(loop_scope="module")]


@pytest.fixture(scope="module")
def loop_scope_directory(tmp_path_factory):
    return tmp_path_factory.mktemp("brokers")


import pytest_asyncio  # noqa: E402


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def consortium(loop_scope_directory):
    made = await Consortium.found(loop_scope_directory)
    try:
        await asyncio.gather(made.admit("alpha", verifier="v1", verifier_url="https://127.0.0.1:1"), made.admit("beta"))
        yield made
    finally:
        await made.close()


async def run(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return await asyncio.to_thread(
        subprocess.run, arguments, cwd=cwd, capture_output=True, text=True, timeout=30, check=False
    )


def curl(provider, path: str, *more: str) -> tuple[str, ...]:
    """A curl that dials the address and checks the name, as any EST client would."""
    address = provider.broker.said["https"]
    host, _, port = address.rpartition(":")
    name = provider.server_name
    return (
        *("curl", "-sS", "--cacert", str(provider.settings.roots), "--connect-to", f"{name}:{port}:{host}:{port}"),
        *("-w", "\n%{http_code}", f"https://{name}:{port}/.well-known/est/{path}", *more),
    )


async def test_a_device_enrols_with_curl_and_openssl(consortium, tmp_path):  # noqa: PLR0915 - one device's story
    """verifies that: EST works with tools that know nothing of us: cacerts, csrattrs, enrol, retry, re-enrol, refusals."""
    beta = consortium.providers["beta"]
    async with beta.admin() as admin:
        given = await admin.post_json("/v1/enrolment-codes", {"device": "phone-1", "ttl_s": 60})
    await run("openssl", "ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", "key.pem", cwd=tmp_path)
    await run(
        *("openssl", "req", "-new", "-key", "key.pem", "-subj", "/CN=whatever", "-outform", "DER", "-out", "csr.der"),
        cwd=tmp_path,
    )
    (tmp_path / "csr.b64").write_bytes(base64.encodebytes((tmp_path / "csr.der").read_bytes()))
    body = ("-H", "Content-Type: application/pkcs10", "--data-binary", "@csr.b64")
    enrol = curl(beta, "simpleenroll", "-u", f"phone-1:{given['code']}", *body)

    async def certificate(arguments: tuple[str, ...]) -> x509.Certificate:
        done = await run(*arguments, cwd=tmp_path)
        answer, _, status = done.stdout.rpartition("\n")
        assert status == "200", done.stdout + done.stderr
        (tmp_path / "p7.der").write_bytes(base64.b64decode(answer))
        shown = await run(*OPENSSL_P7, "-in", "p7.der", "-out", "leaf.pem", cwd=tmp_path)
        assert shown.returncode == 0, shown.stderr
        (found,) = x509.load_pem_x509_certificates((tmp_path / "leaf.pem").read_bytes())
        return found

    leaf = await certificate(enrol)
    assert str(spiffe_id_of(leaf)) == "spiffe://beta.test/device/phone-1"
    again = await certificate(enrol)  # a retry with the same key is answered again
    assert again.public_key() == leaf.public_key()

    done = await run(*curl(beta, "cacerts"), cwd=tmp_path)
    (tmp_path / "ca.der").write_bytes(base64.b64decode(done.stdout.rpartition("\n")[0]))
    await run(*["openssl", "pkcs7", "-inform", "DER", "-in", "ca.der", "-print_certs", "-out", "ca.pem"], cwd=tmp_path)
    root = str(beta.settings.roots)
    done = await run(*f"openssl verify -x509_strict -CAfile {root} -untrusted ca.pem leaf.pem".split(), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    done = await run(*curl(beta, "csrattrs"), cwd=tmp_path)
    (tmp_path / "attrs.der").write_bytes(base64.b64decode(done.stdout.rpartition("\n")[0]))
    done = await run("openssl", "asn1parse", "-inform", "DER", "-in", "attrs.der", cwd=tmp_path)
    assert "prime256v1" in done.stdout
    assert "ecdsa-with-SHA256" in done.stdout

    # Re-enrolment authenticates with the certificate, not with a code.
    chain = (tmp_path / "leaf.pem").read_bytes() + (tmp_path / "ca.pem").read_bytes()
    (tmp_path / "chain.pem").write_bytes(chain)
    reenrol = curl(beta, "simplereenroll", "--cert", "chain.pem", "--key", "key.pem", *body)
    assert str(spiffe_id_of(await certificate(reenrol))) == "spiffe://beta.test/device/phone-1"

    async def refused(arguments: tuple[str, ...], status: str) -> str:
        done = await run(*arguments, cwd=tmp_path)
        text, _, found = done.stdout.rpartition("\n")
        assert found == status, done.stdout + done.stderr
        return json.loads(text)["code"]

    assert await refused(curl(beta, "simpleenroll", *body), "401") == "est.unauthorised"
    assert await refused(curl(beta, "simpleenroll", "-u", "phone-1:guess", *body), "401") == "est.code_invalid"
    assert await refused(curl(beta, "simpleenroll", "-u", f"phone-2:{given['code']}", *body), "401") == "est.code_invalid"
    assert await refused(curl(beta, "simplereenroll", *body), "401") == "http.no_client_certificate"
    assert await refused(curl(beta, "serverkeygen", *body), "401") == "est.unauthorised"
    assert await refused(curl(beta, "fullcmc", *body), "501") == "est.not_offered"
    # The code is bound to the first key: whoever steals it later gets nothing, and somebody hears of it.
    await run("openssl", "ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", "thief.pem", cwd=tmp_path)
    await run(
        *("openssl", "req", "-new", "-key", "thief.pem", "-subj", "/CN=x", "-outform", "DER", "-out", "thief.der"),
        cwd=tmp_path,
    )
    (tmp_path / "csr.b64").write_bytes(base64.b64encode((tmp_path / "thief.der").read_bytes()))
    assert await refused(enrol, "403") == "est.code_used"
    (tmp_path / "csr.b64").write_bytes(b"bm90IGEgY3Ny")
    assert await refused(enrol, "400") == "est.csr_malformed"
    async with beta.admin() as admin:
        alarms = await admin.get_json("/v1/alarms")
    assert alarms["alarms"][0]["code"] == "est.code_used"


async def test_a_forged_csr_is_not_certified(consortium, tmp_path):
    """verifies that: a request not signed by its own key, and one with another kind of key, get no certificate."""
    beta = consortium.providers["beta"]
    async with beta.admin() as admin:
        given = await admin.post_json("/v1/enrolment-codes", {"device": "phone-9"})
    await run("openssl", "ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", "key.pem", cwd=tmp_path)
    for key, code in (("ec:key.pem", "est.possession"), ("rsa:2048", "est.key_kind")):
        more = ("-key", "key.pem") if key.startswith("ec:") else ("-newkey", key, "-nodes", "-keyout", "rsa.pem")
        await run(*("openssl", "req", "-new", *more, "-subj", "/CN=x", "-outform", "DER", "-out", "csr.der"), cwd=tmp_path)
        request = bytearray((tmp_path / "csr.der").read_bytes())
        if code == "est.possession":
            request[-1] ^= 1
        headers = {
            "content-type": "application/pkcs10",
            "authorization": "Basic " + base64.b64encode(f"phone-9:{given['code']}".encode()).decode(),
        }
        async with beta.https() as client:
            with pytest.raises(MoorlineError) as caught:
                await client.send(
                    "POST", "/.well-known/est/simpleenroll", content=base64.b64encode(bytes(request)), headers=headers
                )
        assert caught.value.code == code


async def test_peers_meet_through_the_ledger(consortium):
    """verifies that: two HSMs authenticate from the ledger alone and both keep what both signed."""
    alpha, beta = consortium.providers["alpha"], consortium.providers["beta"]
    async with alpha.admin() as admin:
        met = await admin.post_json("/v1/peers/connect", {"provider": "beta", "hsm": "hsm-1"})
        mine = (await admin.get_json("/v1/peers"))["peers"]
    async with beta.admin() as admin:
        theirs = (await admin.get_json("/v1/peers"))["peers"]
    assert [peer["transcript"] for peer in (*mine, *theirs)] == [met["transcript"]] * 2
    assert [peer["provider"] for peer in (*mine, *theirs)] == ["beta", "alpha"]


async def pairs(provider):
    async with provider.admin() as admin:
        return (await admin.get_json("/v1/pairs"))["pairs"]


async def anchored(consortium, provider, peer):
    """What the ledger has of a provider's pair with a peer: epoch and transcript, or None."""
    key = records.audit_anchor_key(provider, pair.anchor_name((provider, "hsm-1"), (peer, "hsm-1")))
    state = verify_bundle(await consortium.client.prove((key,)), consortium.ceremony.trust, now=SystemClock().now())
    try:
        record = records.parse(records.AuditAnchorRecord, state.record(key))
    except Refused:
        return None
    return record.size, record.root.hex()


async def test_peers_agree_on_a_key_rotate_it_and_anchor_both_epochs(consortium):
    """verifies that: two HSMs that met hold one pair key, either may rotate it, and the transcripts stand on the ledger."""
    alpha, beta = consortium.providers["alpha"], consortium.providers["beta"]
    async with alpha.admin() as admin:
        await admin.post_json("/v1/peers/connect", {"provider": "beta", "hsm": "hsm-1"})
        await admin.post_json(
            "/v1/peers/connect", {"provider": "beta", "hsm": "hsm-1"}
        )  # meeting again agrees on nothing new
    for epoch, asking, peer in ((1, None, None), (2, beta, "alpha")):
        if asking is not None:
            async with asking.admin() as admin:
                await admin.post_json("/v1/peers/connect", {"provider": peer, "hsm": "hsm-1", "rotate": True})
        mine, theirs = (await pairs(alpha))[0], (await pairs(beta))[0]
        assert (mine["epoch"], mine["state"]) == (theirs["epoch"], theirs["state"]) == (epoch, "active")
        assert mine["transcript"] == theirs["transcript"]
        for name, other in (("alpha", "beta"), ("beta", "alpha")):
            async with asyncio.timeout(20):
                while await anchored(consortium, name, other) != (epoch, mine["transcript"]):  # noqa: ASYNC110
                    await asyncio.sleep(0.1)


async def test_what_a_peer_tells_counts_as_far_as_the_ledger_proves_it(consortium):
    """verifies that: revocations since the last time come with the next meeting."""
    alpha, beta = consortium.providers["alpha"], consortium.providers["beta"]
    _, _, given = await svid(beta, "spiffe://beta.test/device/told")
    serial = f"{x509.load_pem_x509_certificate(given['certificate'].encode()).serial_number:x}"
    async with beta.admin() as admin:
        await admin.post_json("/v1/certificates/revoke", {"serial": serial, "reason": "key_compromise"})
        async with asyncio.timeout(20):
            while (await admin.get_json("/v1/revocation"))["not_on_ledger_yet"]:  # noqa: ASYNC110
                await asyncio.sleep(0.1)
    for _ in range(2):  # the second time there is nothing new
        async with alpha.admin() as admin:
            await admin.post_json("/v1/peers/connect", {"provider": "beta", "hsm": "hsm-1"})
        assert (await pairs(alpha))[0]["revoked_by_peer"] == 1


async def test_a_peer_that_is_not_registered_is_refused(consortium):
    """verifies that: an HSM the ledger does not know is not even dialled; a revoked one is refused from both sides."""
    alpha = consortium.providers["alpha"]
    async with alpha.admin() as admin:
        for provider, hsm, code in (
            ("gamma", "hsm-1", "ledger.provider_not_active"),
            ("beta", "hsm-9", "ledger.hsm_not_active"),
            ("../x", "hsm-1", "name.malformed"),
        ):
            with pytest.raises(MoorlineError) as caught:
                await admin.post_json("/v1/peers/connect", {"provider": provider, "hsm": hsm})
            assert caught.value.code == code
    late = await consortium.admit("late")
    await late.submitter.send(tx.RevokeHsm(id="hsm-1"))
    async with late.admin() as admin:
        with pytest.raises(MoorlineError) as caught:
            await admin.post_json("/v1/peers/connect", {"provider": "beta", "hsm": "hsm-1"})
    # Beta's broker says so: late's own record is no longer active.
    assert caught.value.code == "ledger.hsm_not_active"
    async with alpha.admin() as admin:
        with pytest.raises(MoorlineError) as caught:
            await admin.post_json("/v1/peers/connect", {"provider": "late", "hsm": "hsm-1"})
    assert caught.value.code == "ledger.hsm_not_active"
    await late.broker.stop()


async def svid(provider, name: str) -> tuple[ec.EllipticCurvePrivateKey, ClientIdentity, dict]:
    await provider.register(name)
    key = ec.generate_private_key(ec.SECP256R1())
    public = base64.b64encode(keys.public_bytes(key.public_key())).decode()
    async with provider.admin() as admin:
        given = await admin.post_json("/v1/svid", {"public_key": public, "spiffe_id": name})
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    return key, ClientIdentity(certificate_chain_pem=given["chain"].encode(), private_key_pem=pem), given


async def test_svids_and_the_verifiers_signature(consortium):
    """verifies that: the admin socket names its own domain only, and only the configured verifier has results signed."""
    alpha = consortium.providers["alpha"]
    _, verifier, given = await svid(alpha, "spiffe://alpha.test/verifier/v1")
    chain = x509.load_pem_x509_certificates(given["chain"].encode())
    ders = [certificate.public_bytes(serialization.Encoding.DER) for certificate in chain]
    roots = [c.public_bytes(serialization.Encoding.DER) for c in x509.load_pem_x509_certificates(alpha.roots_pem)]
    assert str(verify_chain(ders[0], ders[1:], roots, SystemClock().now()).spiffe_id) == "spiffe://alpha.test/verifier/v1"

    def part(value: object) -> bytes:
        return base64.urlsafe_b64encode(json.dumps(value).encode()).rstrip(b"=")

    message = part({"alg": "ES256", "typ": "JWT"}) + b"." + part({"sub": "host/h1"})
    asked = {"key": "verifier", "messages": [base64.b64encode(message).decode()] * 2}
    async with alpha.https(verifier) as client:
        signed = await client.post_json("/v1/sign", asked)
        assert len(signed["signatures"]) == 2
        keys.verify(alpha.hsm.keys.verifier, base64.b64decode(signed["signatures"][1]), message)
        for wrong in (
            {**asked, "key": "hsm-identity"},
            {**asked, "messages": [*asked["messages"], base64.b64encode(b"anything").decode()]},
            {**asked, "messages": [base64.b64encode(part({"alg": "none"}) + b"." + part({})).decode()]},
            {**asked, "messages": []},
            {**asked, "messages": asked["messages"] * 65},
            {**asked, "messages": "text"},
            {"key": "verifier"},
            [],
        ):
            with pytest.raises(MoorlineError) as caught:
                await client.post_json("/v1/sign", wrong)
            assert caught.value.code == "broker.sign_refused"
    for name in ("spiffe://alpha.test/verifier/v2", "spiffe://alpha.test/orchestrator/o1"):
        _, other, _ = await svid(alpha, name)
        async with alpha.https(other) as client:
            with pytest.raises(MoorlineError) as caught:
                await client.post_json("/v1/sign", asked)
            assert caught.value.code == "http.not_authorised"
    async with alpha.https() as client:
        with pytest.raises(MoorlineError) as caught:
            await client.post_json("/v1/sign", asked)
        assert caught.value.code == "http.no_client_certificate"


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("spiffe://beta.test/verifier/v1", "issuing.not_ours"),
        ("spiffe://alpha.test/hsm/hsm-1", "issuing.not_ours"),
        ("spiffe://alpha.test/svc/records/r-1", "broker.request_malformed"),
        ("https://alpha.test/verifier/v1", "spiffe.malformed"),
    ],
)
async def test_names_the_admin_socket_does_not_give(consortium, name, code):
    """verifies that: no other domain, no HSM, and no function gets its identity by asking."""
    with pytest.raises(MoorlineError) as caught:
        await svid(consortium.providers["alpha"], name)
    assert caught.value.code == code


async def test_strangers_at_every_port(consortium):
    """verifies that: garbage, plain HTTP, silence and oversized bodies are refused or dropped, and the broker serves on."""
    alpha = consortium.providers["alpha"]
    socket_path = str(alpha.settings.admin_socket)
    garbage = (b"\x00" * 64, b"GET / HTTP/1.1\r\n\r\n", b"\xff" * 70000, b"\x16\x03\x01\xff\xff" + b"A" * 4000)
    for port in (alpha.broker.said["sessions"], alpha.broker.said["https"], socket_path):
        for sent in garbage:
            if port == socket_path:
                reader, writer = await asyncio.open_unix_connection(port)
            else:
                host, _, number = port.rpartition(":")
                reader, writer = await asyncio.open_connection(host, int(number))
            try:
                writer.write(sent)
                writer.write_eof()
                await asyncio.wait_for(reader.read(65536), 20)
            except (ConnectionError, OSError):
                pass  # dropped, as it should be
            finally:
                writer.close()
    async with alpha.https() as client:
        with pytest.raises(MoorlineError) as caught:
            await client.send("POST", "/v1/sign", content=b"x" * 300_000, headers={"content-type": "application/json"})
        assert caught.value.code in {"http.body_too_large", "peer.unreachable"}
        assert (await client.get_bytes("/v1/ca-bundle")) == alpha.roots_pem
    async with alpha.admin() as admin:
        with pytest.raises(MoorlineError) as caught:
            await admin.post_json("/v1/enrolment-codes", {"device": "x", "tll_s": 5})
        assert caught.value.code == "http.request_malformed"
        assert "identity" in await admin.get_json("/v1/keys")


async def test_a_killed_broker_comes_back_with_everything(consortium):
    """verifies that: after SIGKILL the broker starts again on the same token and database, and no alarm is raised by it."""
    import signal

    beta = consortium.providers["beta"]
    async with beta.admin() as admin:
        before = (await admin.get_json("/v1/audit"))["entries"]
        epoch = await admin.post_json("/v1/epochs", {})
    await beta.broker.stop(signal.SIGKILL)
    await beta.broker.start()
    async with beta.admin() as admin:
        after = (await admin.get_json("/v1/audit"))["entries"]
        assert after[: len(before)] == before
        assert after[len(before)]["kind"] == "epoch-opened"
        assert (await admin.post_json("/v1/epochs", {}))["epoch"] > epoch["epoch"]
        assert "broker.database_restored" not in {a["code"] for a in (await admin.get_json("/v1/alarms"))["alarms"]}


async def anchored_size(consortium, provider: str) -> int:
    key = records.audit_anchor_key(provider, "hsm-1")
    bundle = await consortium.client.prove((key,))
    state = verify_bundle(bundle, consortium.ceremony.trust, now=SystemClock().now())
    try:
        return records.parse(records.AuditAnchorRecord, state.record(key)).size
    except Refused:
        return 0


async def until_anchored(consortium, provider: str, size: int) -> None:
    async with asyncio.timeout(20):
        while await anchored_size(consortium, provider) < size:  # noqa: ASYNC110 - the condition is in another process
            await asyncio.sleep(0.1)


async def test_a_database_behind_its_anchor_stops_launching(consortium):
    """verifies that: the log is anchored on the ledger, and a broker with a restored database raises an alarm."""
    delta = await consortium.admit("delta")
    database = delta.settings.database

    async def one_more(count: int) -> None:
        """Add an entry; stop and start, for a broker anchors what it has when it starts."""
        async with delta.admin() as admin:
            await admin.post_json("/v1/enrolment-codes", {"device": f"d-{count}"})
        await delta.broker.stop()

    await one_more(1)
    shutil.copy(database, database.with_suffix(".backup"))
    await delta.broker.start()
    await until_anchored(consortium, "delta", 1)
    await one_more(2)
    await delta.broker.start()
    await until_anchored(consortium, "delta", 2)
    async with delta.admin() as admin:
        assert (await admin.get_json("/v1/alarms"))["alarms"] == []
    await delta.broker.stop()
    for left in database.parent.glob(f"{database.name}-*"):
        left.unlink()
    shutil.copy(database.with_suffix(".backup"), database)
    for _ in range(2):  # noticed once, not at every start
        await delta.broker.start()
        async with delta.admin() as admin:
            alarms = (await admin.get_json("/v1/alarms"))["alarms"]
        assert [alarm["code"] for alarm in alarms] == ["broker.database_restored"]
        await delta.broker.stop()


async def test_bundles_are_signed_for_one_peer(consortium):
    """verifies that: what a peer kept is the other's bundle, made for it, under this ledger."""
    from moorline.storage.broker_store import BrokerStore

    alpha = consortium.providers["alpha"]
    store = BrokerStore.open(f"sqlite:///{alpha.settings.database}")
    (peer,) = [peer for peer in store.peers() if peer.provider == "beta"]
    signed = cose.parse(BUNDLE_PURPOSE, peer.bundle)
    bundle = schema.decode(TrustBundle, cose.verify(signed, consortium.providers["beta"].hsm.keys.identity))
    assert (bundle.peer_provider, bundle.ledger_id) == ("alpha", consortium.ceremony.trust.ledger_id)
    store.close()


async def test_https_is_restarted_on_the_same_address(consortium, monkeypatch):
    """verifies that: when the server is restarted for a fresh certificate, its address stays and it serves again."""
    from moorline.services import broker as broker_module
    from moorline.services import broker_est
    from moorline.services.broker_cmp import Cmp
    from moorline.services.broker_revocation import Lists

    gamma = await consortium.admit("gamma", start=False)
    monkeypatch.setattr(broker_est, "ROTATE_S", 0.2)
    composed = broker_module.compose(gamma.settings)
    addresses: list[str] = []
    third = asyncio.Event()

    def bound(address: str) -> None:
        addresses.append(address)
        if len(addresses) == 3:
            monkeypatch.setattr(broker_est, "ROTATE_S", 600.0)
            third.set()

    serving = asyncio.ensure_future(broker_est.serve(composed, Lists(composed), Cmp(composed), bound))
    try:
        async with asyncio.timeout(20):
            await third.wait()
        gamma.broker.said = {"https": addresses[0]}
        async with gamma.https() as client:
            assert await client.get_bytes("/v1/ca-bundle") == gamma.roots_pem
        assert len(set(addresses)) == 1
    finally:
        serving.cancel()
        await composed.ledger.aclose()
        composed.close()
