"""An HSM with custodians and tenants behind a real broker, looked after with `moor hsm`, lost, and restored from its backup.

One story: each test goes on where the one before it ended. Canaries are looked for in everything the processes said.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import json
import os
import secrets
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import pytest_asyncio
from cryptography import x509
from cryptography.hazmat.primitives import serialization

from moorline.cli import hsm_request, provider_changes
from moorline.cli import run as moor
from moorline.clock import Instant, SystemClock, Validity
from moorline.errors import MoorlineError
from moorline.hsm import approvals
from moorline.hsm.provider import certify_hsm
from moorline.hsm.tenants import verify_destroyed
from moorline.hsm.token import RemoteToken
from moorline.ledger import transactions as tx
from moorline.services import settings
from moorline.services.key_files import load_publics
from moorline.services.token_owner import TokenOwnerSettings
from moorline.storage.hsm_store import HsmStore
from moorline.wire import keys, schema

sys.path.insert(0, str(Path(__file__).parent))
from consortium import Consortium, Process, der

pytestmark = [pytest.mark.story, pytest.mark.asyncio(loop_scope="module")]
PEOPLE = ("ada", "bo", "cy")


class World:
    """Alpha, its custodians, and everything that was said."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.consortium: Consortium = None  # type: ignore[assignment]
        self.said: list[str] = []

    @property
    def alpha(self):
        return self.consortium.providers["alpha"]

    async def moor(self, *words: object, expect: int = 0) -> str:
        """A command line of `moor`, in this process; what it said."""
        out, err = io.StringIO(), io.StringIO()

        def command() -> int:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                return moor([str(word) for word in words])

        code = await asyncio.to_thread(command)
        self.said += [out.getvalue(), err.getvalue()]
        assert code == expect, (words, out.getvalue(), err.getvalue())
        return out.getvalue() or err.getvalue()

    async def hsm(self, *words: object, expect: int = 0) -> dict:
        """A command of `moor hsm` at alpha's broker, as JSON."""
        said = await self.moor("hsm", *words, "--broker", self.alpha.directory, "--json", expect=expect)
        return json.loads(said.splitlines()[-1])

    async def approved(self, request: str, *names: str) -> None:
        for name in names:
            await self.hsm("approve", request, "--custodian", self.directory / name)

    def ask_for_certificates(self) -> None:
        """request.json beside broker.toml, as `moor init broker` leaves it."""
        from moorline.cli import hsm_request

        made = hsm_request.make(
            self.alpha.hsm.keys,
            provider="alpha",
            trust_domain="alpha.test",
            hsm="hsm-1",
            issuing_ca="ca-1",
            sessions=self.alpha.settings.listen_sessions,
            https=self.alpha.settings.listen_https,
        )
        (self.alpha.directory / hsm_request.FILE).write_bytes(made.render())

    def secrets(self) -> list[str]:
        """What must stand nowhere: PINs of the HSM and its tenants."""
        pins = [path.read_text() for path in self.alpha.directory.rglob("pin") if path.is_file()]
        assert pins
        return pins


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def world(tmp_path_factory):
    made = World(tmp_path_factory.mktemp("s"))
    os.environ["MOOR_KILL_AT"] = str(made.directory / "kill")
    for name in PEOPLE:
        await made.moor("hsm", "custodian", "new", name, "--dir", made.directory / name)
    from moorline.cli.hsm_custody import circle_of

    circle = circle_of([made.directory / name / "custodian.cbor" for name in PEOPLE], 2)
    made.consortium = await Consortium.found(made.directory)
    folder = made.directory / "alpha"
    try:
        await made.consortium.admit("alpha", circle=circle, custody=folder / "token" / "custody.cbor", tenants=folder / "v")
        made.ask_for_certificates()
        yield made
    finally:
        del os.environ["MOOR_KILL_AT"]
        await made.consortium.close()


async def test_inspect(world):
    """verifies that: keys, attributes, roles, health and capabilities are shown, for people and for programs."""
    found = await world.hsm("inspect")
    assert found["token"]["health"] == "good"
    facts = {(each["label"], each["kind"]): each for each in found["keys"]}
    ca = facts["issuing-ca", "private"]
    assert (ca["sensitive"], ca["extractable"], ca["trust_needed"], ca["local"]) == (True, True, True, True)
    assert "signs identities" in ca["role"]
    assert {each["name"] for each in found["capabilities"] if not each["present"]} == set()
    assert any(each["name"] == "AES_GCM" for each in found["mechanisms"])
    text = await world.moor("hsm", "inspect", "--broker", world.alpha.directory)
    assert "issuing-ca" in text
    assert "consequence" in text
    await world.moor("hsm", "inspect", expect=64)


async def test_a_wrapping_key_is_rotated_and_destroyed_by_a_quorum(world):
    """verifies that: rotate, rewrap, retire; destruction refused with no and one approval, granted once with two."""
    (world.directory / "kill").write_text("hsm.key.made")
    await world.hsm("key", "rotate", "wrapping", expect=2)
    assert await asyncio.wait_for(world.alpha.broker.running.wait(), 20) == -9
    await world.alpha.broker.start()
    made = await world.hsm("key", "rotate", "wrapping")  # goes on with the key that was made
    assert (made["label"], made["state"]) == ("wrapping@2", "active")
    assert (await world.hsm("key", "rewrap"))["unreadable"] == 0
    refused = await world.hsm("key", "retire", "wrapping", expect=1)
    assert refused["error"]["code"] == "key.overlap"
    begun = await world.hsm("key", "rotate", "issuing-ca", "--issuing-ca", "ca-9", "--output", world.directory / "never")
    assert begun["label"] == "issuing-ca@2"
    waiting = await world.hsm("key", "destroy", "issuing-ca@2")
    request = waiting["request"]
    again = ("key", "destroy", "issuing-ca@2", "--request", request)
    assert (await world.hsm(*again, expect=1))["error"]["code"] == "approval.missing"
    await world.approved(request, "ada")
    assert (await world.hsm(*again, expect=1))["error"]["code"] == "approval.missing"
    assert (await world.hsm("approve", request, "--custodian", world.directory / "ada", expect=1))["error"][
        "code"
    ] == "hsm.already_there"
    await world.approved(request, "cy")
    other = await world.hsm("key", "destroy", "wrapping", "--request", request, expect=1)
    assert other["error"]["code"] == "key.state"
    assert (await world.hsm(*again))["state"] == "destroyed"
    assert (await world.hsm(*again, expect=1))["error"]["code"] == "key.state"
    found = await world.hsm("inspect")
    assert not any(each["label"] == "issuing-ca@2" for each in found["keys"])
    (shown,) = (await world.hsm("requests"))["requests"]
    assert sorted(shown["approved_by"]) == ["ada", "cy"]
    assert shown["used"] is not None


def certified(world, request: Path):
    """What the provider signs for a request, with its real key."""
    from moorline.cli import hsm_request

    asked = hsm_request.read(request)
    now = SystemClock().now()
    return certify_hsm(
        world.alpha.issuer,
        asked.keys(),
        trust_domain="alpha.test",
        hsm="hsm-1",
        issuing_ca=asked.issuing_ca,
        address=world.alpha.settings.listen_sessions,
        validity=Validity(not_before=Instant(now - 60), not_after=Instant(now + 86400)),
        serials=(secrets.randbits(100), secrets.randbits(100)),
    )


def pem(path: Path, certificate) -> Path:
    path.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    return path


async def svid(world) -> list[x509.Certificate]:
    directory = world.directory / f"svid-{secrets.token_hex(4)}"
    await world.hsm("svid", "operator", "o-1", "--dir", directory)
    return x509.load_pem_x509_certificates((directory / "chain.pem").read_bytes())


async def est_bundle(world) -> list[bytes]:
    async with world.alpha.https() as client:
        import base64

        answer = await client.send("GET", "/.well-known/est/cacerts", headers={})
        body = base64.b64decode(answer if isinstance(answer, bytes) else answer.body)
    from cryptography.hazmat.primitives.serialization import pkcs7

    return [der(each) for each in pkcs7.load_der_pkcs7_certificates(body)]


async def test_the_issuing_ca_is_rotated_with_an_overlap(world):
    """verifies that: nothing is signed by the new CA before the ledger has it; afterwards both chains are served."""
    before = await svid(world)
    folder = world.directory / "ca-2"
    rotate = ("key", "rotate", "issuing-ca", "--issuing-ca", "ca-2", "--broker", world.alpha.directory, "--output")
    other = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "moorline.cli", "hsm", *map(str, rotate), str(world.directory / "ca-2-too")
    )
    label = (await world.hsm(*rotate[:5], "--output", folder))["label"]
    assert await other.wait() == 0  # two who begin at once begin one key
    assert label == "issuing-ca@3"  # a destroyed key's name is not used again
    assert (await world.hsm(*rotate[:5], "--output", folder, expect=2))["error"]["code"] == "cli.file_exists"
    again = await world.hsm(*rotate[:5], "--output", world.directory / "ca-2-again")
    assert again["label"] == label  # whoever was interrupted asks once more
    requests = [(world.directory / name / "request.json").read_bytes() for name in ("ca-2", "ca-2-too", "ca-2-again")]
    assert len(set(requests)) == 1
    assert (await world.hsm("key", "destroy", "issuing-ca", expect=1))["error"]["code"] == "key.state"
    assert (await world.hsm("key", "destroy", "issuing-ca@9", expect=1))["error"]["code"] == "key.unknown"
    signed = certified(world, folder / "request.json")
    certificate = pem(folder / "issuing-ca.pem", signed.issuing_ca)
    activate = ("key", "activate", label, "--certificate", certificate)
    assert "ledger." in (await world.hsm(*activate, expect=1))["error"]["code"]
    assert (await svid(world))[1] == before[1]
    await world.alpha.submitter.send(tx.RegisterIssuingCa(id="ca-2", certificate=der(signed.issuing_ca)))
    assert (await world.hsm(*activate))["state"] == "active"
    after = await svid(world)
    assert after[1] == signed.issuing_ca
    assert before[1] != after[1]
    for leaf, issuer in (before[:2], after[:2]):
        leaf.verify_directly_issued_by(issuer)
    states = {each["label"]: each["state"] for each in (await world.hsm("key", "list"))["keys"]}
    assert (states["issuing-ca"], states[label]) == ("retiring", "active")
    bundle = await est_bundle(world)
    assert der(before[1]) in bundle
    assert der(after[1]) in bundle


async def test_the_hsm_identity_is_rotated_by_a_ledger_transaction(world):
    """verifies that: after RotateHsm and activation the broker's TLS certificate is under the new HSM key."""
    folder = world.directory / "id-2"
    label = (await world.hsm("key", "rotate", "hsm-identity", "--output", folder))["label"]
    signed = certified(world, folder / "request.json")
    certificate = pem(folder / "hsm.pem", signed.hsm)
    activate = ("key", "activate", label, "--certificate", certificate)
    assert (await world.hsm(*activate, expect=1))["error"]["code"] == "key.not_registered"
    identity = signed.hsm.public_key()
    await world.alpha.submitter.send(
        tx.RotateHsm(
            id="hsm-1",
            certificate=der(signed.hsm),
            address=world.alpha.settings.listen_sessions,
            est_url=f"https://{world.alpha.settings.listen_https}/.well-known/est",
            kem_public=world.alpha.hsm.keys.kem,
            signing_public=keys.public_bytes(identity),
            bundle_sequence=2,
        )
    )
    assert (await world.hsm(*activate))["state"] == "active"
    host, _, port = world.alpha.broker.said["sessions"].rpartition(":")
    command = ["openssl", "s_client", "-connect", f"{host}:{port}", "-showcerts"]
    done = await asyncio.to_thread(subprocess.run, command, input=b"", capture_output=True, timeout=20, check=False)
    shown = x509.load_pem_x509_certificates(done.stdout[done.stdout.index(b"-----BEGIN") :].split(b"---\nServer")[0])
    shown[0].verify_directly_issued_by(signed.hsm)
    world.identity = (certificate, identity)


async def test_kem_and_verifier_keys_are_rotated(world):
    """verifies that: a KEM key counts when the ledger has it, beside the identity of now; verifier keys are told first."""
    folder = world.directory / "kem-2"
    label = (await world.hsm("key", "rotate", "hsm-kem", "--output", folder))["label"]
    assert (await world.hsm("key", "activate", label, expect=1))["error"]["code"] == "key.not_registered"
    asked, certificate = (
        hsm_request.read(folder / "request.json"),
        x509.load_pem_x509_certificate((folder / "hsm.pem").read_bytes()),
    )
    assert keys.public_bytes(asked.keys().identity) == keys.public_bytes(world.identity[1])  # not the first ceremony's
    assert asked.keys().kem != world.alpha.hsm.keys.kem
    body = provider_changes.hsm_body(tx.RotateHsm, asked, folder / "hsm.pem", 3)
    assert body.certificate == der(certificate)
    await world.alpha.submitter.send(body)
    assert (await world.hsm("key", "activate", label))["state"] == "active"
    await svid(world)  # the TLS certificate is still under the certificate that the ledger has
    before = await world.hsm("show", "keys")
    label = (await world.hsm("key", "rotate", "verifier", "--output", world.directory / "v-2"))["label"]
    known = load_publics(world.directory / "v-2" / "verifier.pem")
    assert len(known) == 2
    assert base64.b64encode(keys.public_bytes(known[0])).decode() == before["verifier"]
    assert (await world.hsm("key", "activate", label))["state"] == "active"
    after = await world.hsm("show", "keys")
    assert after["verifier"] == base64.b64encode(keys.public_bytes(known[1])).decode()
    assert after["kem"] == base64.b64encode(asked.keys().kem).decode()
    wrong = ("key", "activate", "verifier@9", "--certificate", folder / "hsm.pem")
    assert (await world.hsm(*wrong, expect=2))["error"]["code"] == "key.role"


async def test_a_tenant_from_its_making_to_its_end(world):
    """verifies that: a tenant is made, used, suspended and resumed; destroyed only by a quorum, with proof."""
    made = await world.hsm("tenant", "create", "clinic", "--uid", os.geteuid())
    with RemoteToken(Path(made["socket"])) as clinic:
        clinic.generate_ec_key("signer")
        await world.hsm("tenant", "suspend", "clinic")
        with pytest.raises(MoorlineError):
            clinic.ec_point("signer")
        await world.hsm("tenant", "resume", "clinic")
        assert len(clinic.ec_point("signer")) == 65
        world.tenant_pin = text_of(Path(made["socket"]).parents[1] / "pin")
        assert world.tenant_pin
    assert (await world.hsm("tenant", "destroy", "nobody", expect=1))["error"]["code"] == "tenant.unknown"
    request = (await world.hsm("tenant", "destroy", "clinic"))["request"]
    taken = ("tenant", "destroy", "clinic", "--request", request, "--proof", world.directory / "ada" / "custodian.cbor")
    assert (await world.hsm(*taken, expect=2))["error"]["code"] == "cli.file_exists"  # before anything is gone
    destroy = ("tenant", "destroy", "clinic", "--request", request, "--proof", world.directory / "proof")
    assert (await world.hsm(*destroy, expect=1))["error"]["code"] == "approval.missing"
    await world.approved(request, "bo", "cy")
    assert (await world.hsm(*destroy))["state"] == "destroyed"
    record = verify_destroyed((world.directory / "proof").read_bytes(), world.identity[1])
    assert (record.tenant, record.objects_seen_afterwards, record.token_listed_afterwards) == ("clinic", 0, False)
    listed = (await world.hsm("tenant", "list"))["tenants"]
    assert [(each["name"], each["state"]) for each in listed] == [("clinic", "destroyed")]
    assert (await world.hsm("tenant", "create", "clinic", "--uid", 0, expect=1))["error"]["code"] == "hsm.already_there"


async def rotated_through_the_socket(world, socket: Path) -> None:
    """Keys of every kind are begun at the owner; none is destroyed there without the custodians' own signatures."""
    assert (await world.hsm("key", "rotate", "wrapping"))["state"] == "active"
    assert (await world.hsm("key", "rewrap"))["unreadable"] == 0
    label = (await world.hsm("key", "rotate", "hsm-kem", "--output", world.directory / "kem"))["label"]
    facts = {(each["label"], each["kind"]): each for each in (await world.hsm("inspect"))["keys"]}
    assert facts[label, "private"]["trust_needed"]  # recoverable from a backup, as the key before it
    request = (await world.hsm("key", "destroy", label))["request"]
    again = ("key", "destroy", label, "--request", request)
    await world.approved(request, "ada")
    asked, signed = approval_in_store(world, request)
    with RemoteToken(socket) as door:  # whoever has the socket and one custodian's word, but no quorum
        one = approvals.Grant(request=asked, signed=(signed,))
        for target, grant, code in (
            (label, schema.encode(one), "approval.missing"),
            (label, schema.encode(replace(one, signed=2 * one.signed)), "approval.twice"),
            ("wrapping", schema.encode(one), "approval.other_request"),
            (label, schema.encode(replace(one, request=replace(asked, hsm="hsm-2"))), "approval.other_hsm"),
        ):
            with pytest.raises(MoorlineError) as caught:
                door.destroy_granted(target, grant)
            assert caught.value.code == code
        assert door.has_key(label)
        await world.approved(request, "bo")
        assert (await world.hsm(*again))["state"] == "destroyed"
        assert not door.has_key(label)


def approval_in_store(world, request: str) -> tuple[approvals.Request, bytes]:
    """A request and a custodian's signature for it, as the broker keeps them."""
    store = HsmStore.open(f"sqlite:///{world.alpha.settings.database}")
    try:
        ((_, _, signed),) = store.approvals(bytes.fromhex(request))
        return schema.decode(approvals.Request, store.request(bytes.fromhex(request))), signed
    finally:
        store.close()


def text_of(path: Path) -> str:
    """What is in a file of /proc, as far as it is still there."""
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def said_by_processes(pid: int, log: Path) -> list[str]:
    """Every command line on this machine, and the environment and log of one process."""
    return [*map(text_of, Path("/proc").glob("[0-9]*/cmdline")), text_of(Path(f"/proc/{pid}/environ")), text_of(log)]


async def test_no_secret_is_in_anything_a_process_shows(world):
    """verifies that: PINs are in no log, error, command line or environment; the broker dumps no core."""
    pid = world.alpha.broker.running.pid
    shown = [*world.said, *said_by_processes(pid, world.alpha.broker.log)]
    async with world.alpha.admin() as admin:
        for path in ("/v1/token", "/v1/audit", "/v1/alarms", "/v1/hsm/keys", "/v1/hsm/tenants", "/metrics"):
            answer = await admin.send("GET", path, headers={})
            shown.append(str(getattr(answer, "body", answer)))
    for secret in (*world.secrets(), world.tenant_pin):
        assert not any(secret in text for text in shown)
    limits = text_of(Path(f"/proc/{pid}/limits"))
    assert next(line for line in limits.splitlines() if line.startswith("Max core file size")).split()[4:6] == ["0", "0"]


async def test_the_token_is_lost_and_restored(world):
    """verifies that: from shares and a backup alone a new token serves: same CA, same identity, halted until an epoch."""
    alpha = world.alpha
    await alpha.broker.stop()
    token, out = alpha.directory / "token", world.directory / "alpha.backup"

    async def shares(file: Path, *names: str) -> list[object]:
        found: list[object] = []
        for name in names:
            path = world.directory / f"{name}-{secrets.token_hex(4)}.share"
            await world.moor("hsm", "backup", "share", file, "--custodian", world.directory / name, "--output", path)
            found += ["--share", path]
        return found

    certificate = world.identity[0]
    create = ("hsm", "backup", "create", "--dir", token, "--output", out, "--hsm-certificate", certificate)
    await world.moor(*create, *await shares(token / "custody.cbor", "ada"), expect=1)
    assert not out.exists()
    await world.moor(*create, *await shares(token / "custody.cbor", "ada", "bo"))
    await world.moor("hsm", "backup", "verify", out, "--hsm-certificate", certificate)
    await world.moor("hsm", "backup", "verify", out, "--hsm-certificate", alpha.directory / "hsm.pem", expect=1)
    token.rename(alpha.directory / "lost")
    new = alpha.directory / "token-2"
    restore = ("hsm", "backup", "restore", out, "--hsm-certificate", certificate, "--dir", new)
    await world.moor(*restore, *await shares(out, "bo", "cy"))
    changed = replace(
        alpha.settings, token_pin_file=new / "pin", softhsm_conf=new / "softhsm2.conf", custody=new / "custody.cbor"
    )
    settings.write(changed, alpha.directory / "broker.toml")
    await alpha.broker.start()
    chain = await svid(world)
    chain[0].verify_directly_issued_by(chain[1])
    assert (await world.hsm("show", "alarms"))["alarms"]
    assert (await world.hsm("epoch"))["epoch"] > 1 << 32
    assert (await world.hsm("inspect"))["token"]["health"] == "good"


async def test_the_broker_asks_the_process_that_owns_the_token(world):
    """verifies that: with `moor hsm serve` the broker needs no PIN; it outlives its owner, and says when that is away."""
    alpha = world.alpha
    await alpha.broker.stop()
    new = alpha.directory / "token-2"
    socket = alpha.directory / "own" / "token.sock"
    chosen = TokenOwnerSettings(
        token_module=alpha.settings.token_module,
        token_label="alpha",
        token_pin_file=new / "pin",
        softhsm_conf=new / "softhsm2.conf",
        socket=socket,
        custody=new / "custody.cbor",
        provider="alpha",
        hsm="hsm-1",
    )
    settings.write(chosen, alpha.directory / "token.toml")
    owner = Process(("hsm", "serve", "--config", str(alpha.directory / "token.toml")), alpha.directory / "owner.log")
    await owner.start()
    changed = replace(
        alpha.settings,
        token_label=None,
        token_pin_file=None,
        softhsm_conf=None,
        token_owner=socket,
        tenants=None,
        custody=new / "custody.cbor",
    )
    settings.write(changed, alpha.directory / "broker.toml")
    try:
        await alpha.broker.start()
        await svid(world)
        assert (await world.hsm("epoch"))["epoch"] > 1 << 32
        assert (await world.hsm("inspect"))["token"]["health"] == "good"
        await rotated_through_the_socket(world, socket)
        await owner.stop(signal.SIGKILL)
        directory = world.directory / "never"
        gone = await world.hsm("svid", "operator", "o-1", "--dir", directory, expect=2)
        assert gone["error"]["code"] == "token.owner_gone"
        await owner.start()
        await svid(world)
    finally:
        await alpha.broker.stop()
        await owner.stop()
