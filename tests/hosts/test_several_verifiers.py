"""One host, several authorities: the operator's and one of the law; and false ones, who get nothing."""

import asyncio
import contextlib
import dataclasses
import datetime as dt
import ssl
import sys
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from moorline.clock import SystemClock
from moorline.errors import MoorlineError, NotAuthentic, Refused
from moorline.host_agent.attestation import FileLogs, HostAttestation
from moorline.nfv import Role
from moorline.policy import ear
from moorline.rats import Tier
from moorline.simulators import firmware
from moorline.wire import host as wire
from moorline.wire import schema
from moorline.wire.http import HttpClient, server_context

sys.path.insert(0, str(Path(__file__).parent))
from served import Served
from test_service import PKI, Pki
from test_stories import Machine

pytestmark = pytest.mark.story
PEM = serialization.Encoding.PEM
LAW = "law.test"


@pytest.fixture
async def both(world, tmp_path):
    """Two verifiers with their own databases, keys and reference values, over the same provider's platform records."""
    law = dataclasses.replace(world, directory=tmp_path / "law", ear_key=ec.generate_private_key(ec.SECP256R1()))
    law.directory.mkdir()
    async with contextlib.AsyncExitStack() as stack:
        yield (
            await stack.enter_async_context(Served(world).serving()),
            await stack.enter_async_context(Served(law, LAW, may_ask=("spiffe://alpha.test/orchestrator/o1",)).serving()),
        )


def agent(machine, client, *, verifier=None):
    """The host's agent towards a verifier: its provider's, or a further one by its name."""
    tpm = machine.tpm if verifier is None else machine.tpm.for_verifier(verifier)
    logs = FileLogs(machine.logs / firmware.EVENT_LOG, machine.logs / firmware.IMA_LIST)
    return HostAttestation(host="h1", verifier=client, tpm=tpm, logs=logs, tag=machine.tag, period_s=1)


async def read(served, domain, who):
    async with served.client(who) as client:
        answer = await client.get_json("/v1/results/h1")
    key = served.world.ear_key.public_key()
    return ear.parse_verified(answer["ear"], key, now=SystemClock().now(), audience=domain)


async def test_two_authorities_judge_one_host_each_by_itself(both, world, running):
    """verifies that: each enrols the host's one TPM with a key of its own, judges by its own policy, signs with its own key,
    and answers to its own people and those it names; a verdict of one is none of the other."""
    operator, law = both
    machine = Machine(world, running[0], "h1")
    async with operator.client() as one, law.client() as other:
        mine, theirs = agent(machine, one), agent(machine, other, verifier=law.name)
        first, second = await mine.enrol(), await theirs.enrol()
        assert first.ek_digest == second.ek_digest
        assert first.ak_name != second.ak_name
        assert (await mine.attest()).status == (await theirs.attest()).status == "affirming"
        ours = await read(operator, "alpha.test", "spiffe://alpha.test/operator/ann")
        its = await read(law, LAW, f"spiffe://{LAW}/operator/eve")
        assert (ours.verifier, its.verifier) == ("spiffe://alpha.test/verifier/v1", f"spiffe://{LAW}/verifier/v1")
        assert ours.bound["ak"] != its.bound["ak"]

        law.world.profile = firmware.CHANGED_KERNEL  # the law accepts another kernel than the operator does
        law.authority._appraisal = Served(law.world, LAW).authority._appraisal
        assert (await theirs.attest()).code == "host.kernel_not_in_reference_values"
        assert (await mine.attest()).status == "affirming"
        assert (await read(operator, "alpha.test", "spiffe://alpha.test/operator/ann")).status is Tier.AFFIRMING
        assert (await read(law, LAW, f"spiffe://{LAW}/operator/eve")).status is Tier.CONTRAINDICATED
        assert (await read(law, LAW, "spiffe://alpha.test/orchestrator/o1")).status is Tier.CONTRAINDICATED
    for served, stranger in (
        (law, "spiffe://alpha.test/operator/ann"),
        (law, "spiffe://alpha.test/orchestrator/o2"),
        (operator, f"spiffe://{LAW}/operator/eve"),
    ):
        with pytest.raises(Refused) as refused:
            await read(served, LAW, stranger)
        assert refused.value.code == "http.not_authorised"
    async with law.client("spiffe://alpha.test/orchestrator/o1") as named:  # it may read, and may not make a host attest
        with pytest.raises(Refused):
            await named.post_json("/v1/hosts/h1/ask", {"reason": "suspicion"})


class Relay:
    """A verifier that turns round: what it hears from the host it passes on to another, and back."""

    def __init__(self, behind):
        self.behind = behind

    async def post_cbor(self, path, body):
        return await self.behind.post_cbor(path, body)


async def test_an_authority_cannot_pass_itself_off_as_the_host_to_another(both, world, running):
    """verifies that: a verifier that hands the operator's challenges on gets quotes by a key the operator did not enrol;
    and a credential of the operator's that it hands on is not opened for it."""
    operator, law = both
    machine = Machine(world, running[0], "h1")
    async with operator.client() as one:
        mine = agent(machine, one)
        await mine.enrol()
        assert (await mine.attest()).status == "affirming"
        fooled = agent(machine, Relay(one), verifier=law.name)  # the host believes it talks to the law
        with pytest.raises(NotAuthentic) as refused:
            await fooled.attest()
        assert refused.value.code == "tpm.signature_invalid"

        endorsement = machine.tpm.endorsement()
        asked = wire.EnrolRequest(
            ek_public=endorsement.public,
            ek_certificates=endorsement.certificates,
            ak_public=machine.tpm.attestation_key(),
        )
        sealed = schema.decode(wire.EnrolChallenge, await one.post_cbor("/v1/hosts/h1/enrol", schema.encode(asked)))
        with pytest.raises(Refused) as refused:
            machine.tpm.for_verifier(law.name).activate(sealed.credential_blob, sealed.secret)
        assert refused.value.code == "tpm.activation_failed"
        assert (await mine.attest()).status == "affirming"


# False verifiers -------------------------------------------------------------------------------------------------------


def certificate(pki, *, dns, uri):
    """A certificate under this root for any name at all, as a careless or bribed issuer would make it."""
    key = ec.generate_private_key(ec.SECP256R1())
    now = dt.datetime.now(dt.UTC)
    names = [x509.DNSName(dns), *([] if uri is None else [x509.UniformResourceIdentifier(uri)])]
    made = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([]))
        .issuer_name(pki.root.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - dt.timedelta(minutes=1))
        .not_valid_after(now + dt.timedelta(minutes=30))
        .add_extension(x509.SubjectAlternativeName(names), critical=True)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .sign(pki.key, hashes.SHA256())
    )
    private = key.private_bytes(PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    return made.public_bytes(PEM), private


@contextlib.asynccontextmanager
async def eavesdropping(chain, key):
    """A server under this certificate, and everything that is said to it inside of TLS."""
    heard = bytearray()

    async def listen(reader, writer):
        with contextlib.suppress(ConnectionError, ssl.SSLError):
            heard.extend(await reader.read(1 << 20))
        writer.close()

    server = await asyncio.start_server(listen, "127.0.0.1", 0, ssl=server_context(chain, key))
    try:
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}", heard
    finally:
        server.close()


NAME = "v1.verifier.alpha.test"
FALSE = {
    "another root": (Pki(), NAME, "spiffe://alpha.test/verifier/v1"),
    "a function that carries the verifier's name": (PKI, NAME, "spiffe://alpha.test/function/f1"),
    "a host that carries the verifier's name": (PKI, NAME, "spiffe://alpha.test/host/v1"),
    "another verifier's identity": (PKI, NAME, "spiffe://beta.test/verifier/v1"),
    "a name and no identity": (PKI, NAME, None),
    "an identity and another name": (PKI, "v2.verifier.alpha.test", "spiffe://alpha.test/verifier/v1"),
}


@pytest.mark.parametrize("who", [*FALSE, None])
async def test_a_false_verifier_is_told_nothing(world, running, who):
    """verifies that: whoever is not the verifier gets no name, no key, no quote, no log: not a byte; the control, a true
    certificate, is spoken to."""
    pki, dns, uri = FALSE.get(who, (PKI, NAME, "spiffe://alpha.test/verifier/v1"))
    machine = Machine(world, running[0], "h1")
    async with eavesdropping(*certificate(pki, dns=dns, uri=uri)) as (address, heard):
        async with HttpClient(
            f"https://{address}", server_name=NAME, server_role=Role.VERIFIER, roots_pem=PKI.roots_pem, timeout_s=1
        ) as client:
            for attempt in (agent(machine, client).enrol, agent(machine, client).attest):
                with pytest.raises(MoorlineError) as refused:
                    await attempt()
                assert refused.value.code == ("peer.unreachable" if who is None else "peer.tls_not_trusted")
        assert bool(heard) == (who is None)
