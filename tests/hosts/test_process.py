"""The whole path in real processes: ledger authorities, a broker with its token, the verifier, a host with its TPM."""

import asyncio
import base64
import hashlib
import sys
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from moorline.attesters.tpm import Tpm
from moorline.clock import Instant, SystemClock
from moorline.errors import MoorlineError, Refused
from moorline.evidence.tpm_structures import parse_public
from moorline.host_agent.attestation import FileLogs, HostAttestation
from moorline.ledger import transactions as tx
from moorline.ledger.records import RevocationKind
from moorline.policy import ear, reference_values
from moorline.rats import Tier
from moorline.services import settings
from moorline.services.verifier_settings import VerifierSettings
from moorline.simulators import firmware
from moorline.verification.tpm_identity import endorsement_digest
from moorline.wire import keys
from moorline.wire.http import ClientIdentity, HttpClient

sys.path.insert(0, str(Path(__file__).parents[1] / "hsm"))

from consortium import Consortium, Process, free_addresses

pytestmark = pytest.mark.story
NAME = "v1.verifier.alpha.test"


async def issued(provider, uri, directory):
    """A certificate from the broker's administrator, as files and as an identity."""
    await provider.register(uri)
    key = ec.generate_private_key(ec.SECP256R1())
    public = base64.b64encode(keys.public_bytes(key.public_key())).decode()
    async with provider.admin() as admin:
        answer = await admin.post_json("/v1/svid", {"public_key": public, "spiffe_id": uri})
    private = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    directory.mkdir(exist_ok=True)
    (directory / "chain.pem").write_text(answer["chain"])
    (directory / "key.pem").write_bytes(private)
    return ClientIdentity(certificate_chain_pem=answer["chain"].encode(), private_key_pem=private)


def verifier_settings(made, provider, directory, maker):
    return VerifierSettings(
        id="v1",
        listen=free_addresses(1)[0],
        provider="alpha",
        trust_domain="alpha.test",
        identity_chain=directory / "chain.pem",
        identity_key=directory / "key.pem",
        consortium_roots=made.directory / "ledger" / "roots.pem",
        database=directory / "verifier.db",
        ledger_trust=made.directory / "ledger" / "trust.cbor",
        ledger_urls=provider.settings.ledger_urls,
        broker_url=f"https://{provider.broker.said['https']}",
        broker_name=provider.server_name,
        anchors=("vendor", "simulated"),
        simulated_tpm_roots=(maker.root_path,),
        reference_values=(directory / "good.cose",),
        reference_signers=(directory / "signer.der",),
        lease_s=20,
    )


def published(directory, now):
    """Signed reference values for good boots, and the key that signed them."""
    signer = ec.generate_private_key(ec.SECP256R1())
    values = firmware.reference_values(
        firmware.GOOD, name="good", not_before=Instant(now - 60), not_after=Instant(now + 3000)
    )
    (directory / "good.cose").write_bytes(reference_values.sign(values, keys.KeySigner(signer)))
    (directory / "signer.der").write_bytes(keys.public_bytes(signer.public_key()))
    return signer


def booted(tpm, directory, signer, now):
    """A good boot, and the location tag of h1 in the TPM."""
    firmware.boot(tpm, directory, firmware.GOOD)
    ek_digest = endorsement_digest(parse_public(tpm.endorsement().public).key())
    tag = reference_values.sign_tag(
        reference_values.LocationTag(host="h1", ek_digest=ek_digest, location="EU/DE", not_after=now + 3000),
        keys.KeySigner(signer),
    )
    tpm.write_location(reference_values.tag_digest(tag))
    return ek_digest, tag


def platform(ek_digest, tag):
    """What the provider says about h1 on the ledger."""
    return tx.RegisterPlatform(
        id="h1",
        chip_id=b"\x01" * 64,
        product="Milan",
        ek_digest=ek_digest,
        location="EU/DE",
        tag_digest=hashlib.sha256(tag).digest(),
        simulated=True,
    )


async def test_a_result_is_signed_in_the_token_and_survives_a_killed_verifier(  # noqa: PLR0915 - one story
    maker, running, tmp_path
):
    """verifies that: enrolment needs the ledger; the token signs; state survives SIGKILL; revocation ends the result"""
    now = SystemClock().now()
    made = await Consortium.found(tmp_path, max_age_s=4)
    process = None
    try:
        alpha = await made.admit("alpha", verifier="v1", verifier_url="https://127.0.0.1:1")
        directory = tmp_path / "verifier"
        await issued(alpha, "spiffe://alpha.test/verifier/v1", directory)
        reader = await issued(alpha, "spiffe://alpha.test/orchestrator/o1", tmp_path / "orchestrator")
        signer = published(directory, now)
        configured = verifier_settings(made, alpha, directory, maker)
        settings.write(configured, directory / "verifier.toml")
        process = Process(("verifier", "run", "--config", str(directory / "verifier.toml")), directory / "log")
        await process.start()
        assert process.said["service"] == "verifier"

        with Tpm.open(running[0].tcti) as tpm:
            ek_digest, tag = booted(tpm, tmp_path / "h1", signer, now)
            logs = FileLogs(tmp_path / "h1" / firmware.EVENT_LOG, tmp_path / "h1" / firmware.IMA_LIST)
            url, roots = f"https://{configured.listen}", made.ceremony.roots_pem
            async with HttpClient(url, server_name=NAME, roots_pem=roots) as session:
                agent = HostAttestation(host="h1", verifier=session, tpm=tpm, logs=logs, tag=tag, period_s=1)
                with pytest.raises(Refused) as refused:
                    await agent.enrol()
                assert refused.value.code.startswith("ledger.")
                await alpha.submitter.send(platform(ek_digest, tag))
                await agent.enrol()
                assert (await agent.attest()).status == "affirming"

                async def standing():
                    async with HttpClient(url, server_name=NAME, roots_pem=roots, identity=reader) as asked:
                        answer = await asked.get_json("/v1/results/h1")
                    return ear.parse_verified(
                        answer["ear"], alpha.hsm.keys.verifier, now=SystemClock().now(), audience="alpha.test"
                    )

                first = await standing()
                assert (first.status, first.bound["location"]) == (Tier.AFFIRMING, "EU/DE")
                await process.stop(9)
                await process.start()
                assert await standing() == first
                assert (await agent.attest()).status == "affirming"

                await alpha.submitter.send(tx.Revoke(kind=RevocationKind.HOST, id="h1"))

                async def revoked():
                    """Bound: commit, then at most max_age until the verifier asks the ledger again."""
                    while True:
                        try:
                            await agent.attest()
                        except MoorlineError as error:
                            return error.code
                        await asyncio.sleep(0.2)

                assert await asyncio.wait_for(revoked(), 20) == "ledger.revoked"
                with pytest.raises(Refused) as refused:
                    await standing()
                assert (refused.value.code, refused.value.got) == ("result.withdrawn", "ledger.revoked")
    finally:
        if process is not None:
            await process.stop()
        await made.close()
