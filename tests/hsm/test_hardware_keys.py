"""A device whose key never leaves its PKCS#11 token, or its TPM: foreign clients enrol and renew with it."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import pytest_asyncio
from cryptography import x509
from cryptography.hazmat.primitives import serialization

from moorline.clock import SystemClock
from moorline.device import cmp, enrolment, tls_key
from moorline.device.keys import LABEL, InTpm, close
from moorline.device.store import DeviceStore
from moorline.errors import MoorlineError
from moorline.hsm.keys import TokenEcKey
from moorline.hsm.token import initialise_softhsm, open_token
from moorline.verification.chains import verify_chain
from moorline.wire.certificates import spiffe_id_of
from moorline.wire.der import tlv
from moorline.wire.http import HttpClient

sys.path.insert(0, str(Path(__file__).parent))
from consortium import Consortium, free_addresses
from foreign import Curl, openssl

ENGINE = Path("/usr/lib/x86_64-linux-gnu/engines-3/pkcs11.so")
PROVIDER = Path("/usr/lib/x86_64-linux-gnu/ossl-modules/tpm2.so")
_ECDSA_SHA256 = bytes.fromhex("06082a8648ce3d040302")
_WITH_NULL, _WITHOUT = b"\x30\x0c" + _ECDSA_SHA256 + b"\x05\x00", b"\x30\x0a" + _ECDSA_SHA256
pytestmark = [pytest.mark.story, pytest.mark.asyncio(loop_scope="module")]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def beta(tmp_path_factory):
    consortium = await Consortium.found(tmp_path_factory.mktemp("hardware"))
    try:
        (listen,) = free_addresses(1)
        yield await consortium.admit("beta", listen_revocation=listen, revocation_poll_s=1)
    finally:
        await consortium.close()


async def code(beta, device):
    async with beta.admin() as admin:
        return (await admin.post_json("/v1/enrolment-codes", {"device": device}))["code"]


@pytest.mark.skipif(not ENGINE.exists(), reason="libengine-pkcs11-openssl is not installed")
async def test_a_key_in_a_pkcs11_token_enrols_and_renews_by_tls(beta, tmp_path, monkeypatch):
    """verifies that: curl re-enrols with TLS client authentication by a key that SoftHSM keeps."""

    def made():
        location = initialise_softhsm(tmp_path / "token", label="device")
        with open_token(location) as token:
            token.generate_ec_key("device-key")
        return location

    location = await asyncio.to_thread(made)
    # The PIN is in a file that only the device reads, and in no command line.
    configuration = tmp_path / "openssl.cnf"
    configuration.write_text(
        "openssl_conf = init\n[init]\nengines = engines\n[engines]\npkcs11 = token\n[token]\nengine_id = pkcs11\n"
        f"dynamic_path = {ENGINE}\nMODULE_PATH = {location.module}\nPIN = {(tmp_path / 'token' / 'pin').read_text()}\n"
        "[req]\ndistinguished_name = dn\n[dn]\n"
    )
    configuration.chmod(0o600)
    monkeypatch.setenv("OPENSSL_CONF", str(configuration))
    for name, value in location.environment.items():
        monkeypatch.setenv(name, value)
    key = "pkcs11:token=device;object=device-key;type=private"
    words = ("req", "-new", "-engine", "pkcs11", "-keyform", "engine", "-key", key, "-subj", "/CN=x", "-out", "d.csr.pem")
    openssl(tmp_path, *words, check=True)
    openssl(tmp_path, *["req", "-in", "d.csr.pem", "-outform", "DER", "-out", "d.der"], check=True)
    openssl(tmp_path, *["base64", "-in", "d.der", "-out", "d.b64"], check=True)
    curl = Curl(tmp_path, beta.broker.said["https"], beta.server_name, str(beta.settings.roots))
    given = await code(beta, "token-1")
    (leaf,) = curl.post("simpleenroll", "d", "-u", f"token-1:{given}").certificates(tmp_path)
    assert str(spiffe_id_of(leaf)) == "spiffe://beta.test/device/token-1"
    (tmp_path / "leaf.pem").write_bytes(leaf.public_bytes(serialization.Encoding.PEM))
    shown = ("--engine", "pkcs11", "--key-type", "ENG", "--key", key, "--cert", "leaf.pem")
    (renewed,) = curl.post("simplereenroll", "d", *shown).certificates(tmp_path)
    assert renewed.public_key() == leaf.public_key()
    assert renewed.serial_number != leaf.serial_number


class SoftwareTpm:
    """A swtpm on unix sockets, for OpenSSL's tpm2 provider."""

    def __init__(self, folder):
        self.socket = folder / "tpm.sock"
        state = folder / "tpm"
        state.mkdir()
        self.process = subprocess.Popen(
            [
                *("swtpm", "socket", "--tpm2", "--tpmstate", f"dir={state}", "--flags", "not-need-init,startup-clear"),
                *("--server", f"type=unixio,path={self.socket}", "--ctrl", f"type=unixio,path={self.socket}.ctrl"),
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        until = time.monotonic() + 10
        while not self.socket.exists() and time.monotonic() < until:
            time.sleep(0.02)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.terminate()
        self.process.wait(10)


@pytest.mark.skipif(not PROVIDER.exists(), reason="tpm2-openssl is not installed")
async def test_a_key_in_a_tpm_enrols(beta, tmp_path):
    """verifies that: a CSR is signed in the TPM, and its certificate is for the TPM's key."""
    provider = ("-provider", "tpm2", "-provider", "default", "-propquery", "?provider=tpm2")
    curl = Curl(tmp_path, beta.broker.said["https"], beta.server_name, str(beta.settings.roots))
    with SoftwareTpm(tmp_path) as tpm:
        environment = {**os.environ, "TPM2OPENSSL_TCTI": f"swtpm:path={tpm.socket}"}

        def run(*words, given=None):
            done = subprocess.run(
                ["openssl", *words], cwd=tmp_path, env=environment, capture_output=True, timeout=60, check=False, input=given
            )
            assert done.returncode == 0, done.stderr
            return done.stdout

        key = ("genpkey", *provider, "-algorithm", "EC", "-pkeyopt", "group:P-256", "-out", "key.pem")
        await asyncio.to_thread(run, *key)
        assert (tmp_path / "key.pem").read_text().startswith("-----BEGIN TSS2 PRIVATE KEY-----")
        (tmp_path / "req.cnf").write_text("[req]\ndistinguished_name = dn\n[dn]\n")
        request = ("req", "-new", "-config", "req.cnf", *provider, "-key", "key.pem", "-subj", "/CN=x", "-out", "d.csr.pem")
        await asyncio.to_thread(run, *request)
        await asyncio.to_thread(run, "req", "-in", "d.csr.pem", "-outform", "DER", "-out", "d.der")
        # This provider writes NULL parameters behind ecdsa-with-SHA256, which RFC 5758 forbids; they are not signed.
        whole = (tmp_path / "d.der").read_bytes()
        assert _WITH_NULL in whole
        content = whole[2 if whole[1] < 0x80 else 2 + (whole[1] & 0x7F) :].replace(_WITH_NULL, _WITHOUT)
        (tmp_path / "d.b64").write_bytes(base64.encodebytes(tlv(0x30, content)))
        (leaf,) = curl.post("simpleenroll", "d", "-u", f"tpm-1:{await code(beta, 'tpm-1')}").certificates(tmp_path)
        assert str(spiffe_id_of(leaf)) == "spiffe://beta.test/device/tpm-1"
        await asyncio.to_thread(run, "pkey", *provider, "-in", "key.pem", "-pubout", "-out", "public.pem")
    public = serialization.load_pem_public_key((tmp_path / "public.pem").read_bytes())
    assert leaf.public_key() == public


# Our own device ---------------------------------------------------------------------------------------------------------


class Owner:
    """What a device is given: trust, ledger, code; and its commands, as JSON."""

    def __init__(self, beta, directory):
        self.beta, self.directory = beta, directory

    async def moor(self, *words, expect=0):
        command = [sys.executable, "-m", "moorline.cli", "device", *map(str, words), "--dir", self.directory, "--json"]
        process = await asyncio.create_subprocess_exec(*map(str, command), stdout=-1, stderr=-1)
        out, err = await asyncio.wait_for(process.communicate(), 60)
        assert process.returncode == expect, (out, err)
        return json.loads((out or err).decode().splitlines()[-1])

    async def enrol(self, name, *where, expect=0):
        ledger = self.beta.settings.ledger_trust
        (url, _, authority) = self.beta.settings.ledger_urls[0].partition("|")
        given = ("--ledger", f"{url}={authority}", "--trust", ledger)
        os.environ["MOOR_ENROLMENT_CODE"] = await code(self.beta, name)
        return await self.moor("enrol", "--name", name, *self.home, *given, *where, expect=expect)

    @property
    def home(self):
        return ("--url", f"https://{self.beta.broker.said['https']}", "--server-name", self.beta.server_name)

    def leaf(self):
        return x509.load_pem_x509_certificates((self.directory / "chain.pem").read_bytes())[0]

    async def connected_key(self):
        """The TLS key a connection would use; what a function sees is its certificate."""
        store = DeviceStore(directory=self.directory)
        await tls_key.ensure(store, SystemClock().now())
        identity = store.identity()
        chain = verify_chain(identity.chain[0], identity.chain[1:], store.trust().roots, SystemClock().now())
        return chain, identity


async def lives_in_hardware(owner, name, public):
    """Enrolled, renewed and connected, with the private key in no file."""
    first = owner.leaf()
    assert first.public_key() == public
    assert not (owner.directory / "key.pem").exists()
    await owner.moor("renew", *owner.home)
    second = owner.leaf()
    assert second.public_key() == public
    assert second.serial_number != first.serial_number
    chain, identity = await owner.connected_key()
    assert chain.spiffe_id == spiffe_id_of(second)
    assert str(chain.spiffe_id).endswith(f"/device/{name}")
    assert identity.key.public_key() != public
    again, _ = await owner.connected_key()
    assert again.serial == chain.serial  # kept while it lives
    await the_tls_key_renews_nothing(owner, name, identity)


async def the_tls_key_renews_nothing(owner, name, identity):
    """Whoever took the file with the TLS key asks for more with it: over CMP, and over EST by TLS client authentication."""
    store, now = DeviceStore(directory=owner.directory), SystemClock().now()
    url, server_name, roots = owner.home[1], owner.home[3], store.trust().roots
    csr = cmp.pkcs10(identity.key, name)
    pem = enrolment.roots_pem(store.trust())
    async with HttpClient(url, server_name=server_name, roots_pem=pem) as client:
        with pytest.raises(MoorlineError) as caught:
            await cmp.certified(client, identity.key, identity.chain, csr, roots=roots, now=now)
    assert caught.value.code == "cmp.refused"
    shown = enrolment.client_identity(identity)
    headers = {"content-type": "application/pkcs10", "content-transfer-encoding": "base64"}
    async with HttpClient(url, server_name=server_name, roots_pem=pem, identity=shown) as client:
        path, body = f"{enrolment.EST}/simplereenroll", base64.b64encode(csr)
        with pytest.raises(MoorlineError) as caught:
            await client.send("POST", path, content=body, headers=headers)
    assert caught.value.code == "est.further_certificate"


async def test_our_device_keeps_its_key_in_a_pkcs11_token(beta, tmp_path, monkeypatch):
    """verifies that: `moor device` enrols and renews by signatures of SoftHSM alone; TLS gets a key of an hour beside it."""

    def made():
        return initialise_softhsm(tmp_path / "token", label="device")

    location = await asyncio.to_thread(made)
    for name, value in location.environment.items():
        monkeypatch.setenv(name, value)
    owner = Owner(beta, tmp_path / "device")
    where = ("--token-module", location.module, "--token-label", "device", "--pin-file", tmp_path / "token" / "pin")
    await owner.enrol("held-1", *where)
    with open_token(location) as token:
        public = TokenEcKey(token, LABEL).public_key()
        (fact,) = [fact for fact in token.inspect() if fact.label == LABEL and fact.kind == "private"]
    assert (fact.sensitive, fact.extractable) == (True, False)
    await lives_in_hardware(owner, "held-1", public)
    close()
    # The key does not move: another place for the same directory is refused, and so is a PIN that is not there.
    other = await owner.enrol("held-1", "--tpm", "swtpm:path=/none", expect=2)
    assert other["error"]["code"] == "device.key_elsewhere"
    (tmp_path / "token" / "pin").rename(tmp_path / "token" / "gone")
    assert (await owner.moor("renew", *owner.home, expect=2))["error"]["code"].startswith("token.")


async def test_our_device_keeps_its_key_in_a_tpm(beta, tmp_path):
    """verifies that: `moor device` enrols, renews and connects with a key that follows from the TPM's seed."""
    with SoftwareTpm(tmp_path) as tpm:
        tcti = f"swtpm:path={tpm.socket}"
        owner = Owner(beta, tmp_path / "device")
        await owner.enrol("tpm-2", "--tpm", tcti)
        public = InTpm(tcti=tcti, name="tpm-2").key().public_key()
        assert public != InTpm(tcti=tcti, name="tpm-3").key().public_key()
        await lives_in_hardware(owner, "tpm-2", public)
    gone = await owner.moor("renew", *owner.home, expect=2)
    assert gone["error"]["code"] == "tpm.unreachable"
